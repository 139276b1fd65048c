"""The daemon of one node: holds the newest training state and puts the levels together.

Owns the process that trainers and the CLI talk to. Promises never to import torch and never to
execute anything it receives. Does not import the client.
"""
