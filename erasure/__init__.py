"""Reed-Solomon coding between nodes: matrix, codec, placement.

Empty in this version: a single node has the memory and NVMe levels. It will see bytes, never
tensors, and import `everstep.kernels` and `everstep.proto` only.
"""
