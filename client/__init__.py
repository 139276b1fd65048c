"""Everstep inside the trainer: attach objects, snapshot, restore, rewind.

Public names are re-exported by `everstep`.
"""

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.handle import Snapshot
from everstep.client.limits import Limits, Stats
from everstep.snapshot.placement import Extent, FlatExtent

__all__ = ["Client", "Extent", "FlatExtent", "Limits", "Snapshot", "Stats", "connect"]
