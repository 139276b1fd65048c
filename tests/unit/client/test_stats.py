"""What captures on GPUs did, added up for the user."""

from dataclasses import astuple, fields

from everstep.client.limits import Stats
from everstep.snapshot.device_part import CaptureStats

NAMES = [field.name for field in fields(CaptureStats)]
FIRST = CaptureStats(*range(1, len(NAMES) + 1))
SECOND = CaptureStats(*range(10, 10 * len(NAMES) + 10, 10))
SUM = tuple(11 * number for number in range(1, len(NAMES) + 1))


def test_devices_are_added_up() -> None:
    whole = CaptureStats()
    whole.add(FIRST)
    whole.add(SECOND)
    assert astuple(whole) == SUM


def test_captures_are_added_up() -> None:
    stats = Stats()
    stats.count(FIRST)
    stats.count(SECOND)
    assert tuple(getattr(stats, name) for name in NAMES) == SUM
