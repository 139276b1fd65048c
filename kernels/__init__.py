"""Native kernels behind a plain C ABI, each beside its Python reference.

The nouns: an *image* is the bytes of one shard; a *unit* is the part of it that has a digest of
its own; a *piece* is a byte range of the image together with the memory it comes from or goes to.
Knows nothing of tensors, files or snapshots, and starts no threads: callers share work by units,
and every call releases the GIL. Importing this package loads nothing; `native` loads the library.
"""
