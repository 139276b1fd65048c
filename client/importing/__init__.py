"""Making a first snapshot of another program's checkpoint: the child of `everstep import`.

Owns ``python -m everstep.client.importing``: arguments in, one JSON document on standard output.
Promises that nothing which a checkpoint says is executed: pickles are read as data
(`client/importing/pickled.py`), or by torch's own ``weights_only`` reader; that tensors are mapped,
so that memory does not grow with the checkpoint; and that the job had no snapshot before.
"""
