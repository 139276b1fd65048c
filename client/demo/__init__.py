"""`everstep demo`: a training run that is killed, and ends as if it had not been.

Run as ``python -m everstep.client.demo``.
"""
