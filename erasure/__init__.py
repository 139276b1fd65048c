"""Reed-Solomon coding between nodes, as pure arithmetic.

`rows` says which node holds which part of what, `matrix` which coefficients make and undo a
parity, `codec` applies them to bytes, `placement` says which nodes form a group. Sees bytes, never
tensors, does no I/O, and imports `everstep.kernels` and `everstep.proto` only. The agent moves the
bytes and decides when.
"""
