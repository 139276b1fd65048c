"""The levels as byte stores: memory and NVMe, and the rule for what each may let go.

Sees bytes, never tensors. `level.Level` is the contract that every level keeps.
"""
