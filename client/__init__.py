"""Everstep inside the trainer: attach objects, snapshot, restore, rewind.

Public names are re-exported by `everstep`.
"""

from everstep.client.client import Client, connect
from everstep.client.handle import Snapshot

__all__ = ["Client", "Snapshot", "connect"]
