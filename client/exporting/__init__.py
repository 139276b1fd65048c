"""Writing a snapshot in torch's own formats: the child process of `everstep export`.

Owns ``python -m everstep.client.exporting``: a located snapshot on standard input (a
`RestoreReply`, as a trainer would get it), one JSON document on standard output. Promises that
every unit is checked before its bytes are written, that the output appears whole or not at all,
that a file for torch loads with ``weights_only=True``, and memory that does not grow with the
state: tensors are placeholders without memory until they are written, piece by piece.
"""
