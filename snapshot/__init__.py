"""What a snapshot is made of: layout, record, state tree; taking one apart, putting one back.

Importing this package imports nothing else. Only its capture and restore modules import torch.
"""
