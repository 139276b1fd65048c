"""`import`, before anything is read: what it refuses, and what becomes of its child's errors."""

from pathlib import Path

import pytest

from everstep.agent import children
from everstep.proto.errors import AgentUnavailable, Damaged, FormatInvalid, Refused, Retryable

from .saved import Cli


def test_a_checkpoint_that_is_not_there_is_usage(cli: Cli) -> None:
    outcome = cli("import", "absent.pt", "--job", "gpt", "--json")
    assert outcome.status == 2
    assert "absent.pt" in outcome.document["error"]["message"]


def test_names_that_are_none_are_refused_before_anything_is_read(cli: Cli) -> None:
    Path("model.pt").touch()
    assert cli("import", "model.pt", "--job", "a/b").status == 2
    assert cli("import", "model.pt", "--job", "a", "--format", "numpy").status == 2
    assert cli("import", "model.pt").status == 2


def test_the_childs_error_keeps_its_group() -> None:
    said = {
        "Refused": Refused,
        "InvalidName": Refused,
        "NotPersisted": Retryable,
        "ShardCorrupt": Damaged,
        "no error of ours": Damaged,
    }
    for name, group in said.items():
        error = children._as_raised({"type": name, "message": "why"})
        assert (type(error), str(error)) == (group, "why"), name
    away = {"type": "AgentUnavailable", "message": "m", "address": "unix:/a", "detail": "gone"}
    error = children._as_raised(away)
    assert isinstance(error, AgentUnavailable)
    assert (error.address, error.detail) == ("unix:/a", "gone")


@pytest.mark.parametrize("stdout", [b"", b"killed", b"[]", b"7"])
def test_a_child_that_dies_is_told(stdout: bytes) -> None:
    with pytest.raises(FormatInvalid, match="signal 7"):
        children._reply(stdout, -7)
