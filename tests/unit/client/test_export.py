"""Torch's formats: what is written loads without pickle's powers, and nothing is lost to it."""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.client.exporting.__main__ import plain, write
from everstep.client.exporting.indices import indexed
from everstep.client.exporting.loadable import loadable
from everstep.proto.errors import OutOfSpace, Refused, WriteFailed
from everstep.snapshot.consolidating import PieceReader


def save(form: str, tree: dict[str, Any], output: Path, *, force: bool) -> None:
    with PieceReader({}, 0) as reader:
        write(form, plain(tree), reader, output, force=force)


STATE: dict[str, Any] = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "n": 3}


def grouped(*names: str) -> dict[str, Any]:
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    return {"lr": 0.1, "params": f"{len(names)}:{digest}"}


def members(tree: dict[str, Any]) -> list[list[int]]:
    return [group["params"] for group in tree["param_groups"]]


def test_indices_follow_the_state_where_it_is_complete() -> None:
    tree = {"state": {"b": 1, "a": 2, "c": 3}, "param_groups": [grouped("b"), grouped("a", "c")]}
    found, proven = indexed(tree, ["a", "b", "c"])
    assert proven
    assert found["state"] == {0: 1, 1: 2, 2: 3}
    assert members(found) == [[0], [1, 2]]
    assert found["param_groups"][0]["lr"] == 0.1


def test_indices_follow_the_model_where_a_parameter_has_no_state() -> None:
    tree = {"state": {"c": 3, "a": 1}, "param_groups": [grouped("a", "b", "c")]}
    found, proven = indexed(tree, ["a", "b", "c"])
    assert proven
    assert found["state"] == {2: 3, 0: 1}
    assert members(found) == [[0, 1, 2]]


def test_an_order_that_no_digest_proves_is_never_guessed() -> None:
    tree = {"state": {"a": 1, "b": 2}, "param_groups": [grouped("x", "y")]}
    assert indexed(tree, ["a", "b"]) == (tree, False)
    partly = {"state": {"a": 1}, "param_groups": [grouped("b", "a")]}
    assert indexed(partly, ["a", "b"]) == (partly, False)


def test_what_weights_only_refuses_becomes_something_equal(tmp_path: Path) -> None:
    state = {
        "array": np.arange(4, dtype=">i4").reshape(2, 2),
        "scalar": np.float32(0.5),
        "unsigned": np.array([1, 2**40], dtype="u8"),
        "times": np.array(["2020-01-01"], dtype="M8[D]"),
        "long": np.array([0.25], dtype=np.longdouble),
        "flag": np.bool_(True),
        "nested": OrderedDict(a=(range(2), frozenset({1}), slice(1, 2))),
        "plain": [None, True, 1, 2.5, "x", b"y", 1j, {2}, torch.Size([1]), torch.float16],
    }
    shown = loadable(state)
    save("torch", shown, tmp_path / "out.pt", force=False)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["array"].tolist() == [[0, 1], [2, 3]]
    assert (type(loaded["scalar"]), loaded["scalar"]) == (float, 0.5)
    assert loaded["unsigned"].tolist() == [1, 2**40]
    assert loaded["times"].tolist() == [18262]
    assert loaded["long"].tolist() == [0.25]
    assert (type(loaded["flag"]), loaded["flag"]) == (bool, True)
    assert loaded["nested"] == OrderedDict(a=([0, 1], {1}, (1, 2, None)))
    assert loaded["plain"] == state["plain"]


def test_a_state_that_would_not_load_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="weights_only"):
        save("torch", {"path": Path("x")}, tmp_path / "out.pt", force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_an_output_is_replaced_only_when_told(tmp_path: Path, form: str) -> None:
    output = tmp_path / "out"
    save(form, STATE, output, force=False)
    before = sorted(path.name for path in output.parent.rglob("*"))
    with pytest.raises(Refused, match="--force"):
        save(form, {"n": 4}, output, force=False)
    save(form, STATE, output, force=True)
    assert sorted(path.name for path in output.parent.rglob("*")) == before


def test_only_a_distributed_checkpoint_is_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    for form in ("torch", "dcp"):
        with pytest.raises(Refused):
            save(form, STATE, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_full_disk_is_one_of_our_errors_and_leaves_nothing(form: str) -> None:
    # Writing to it, or making anything in it, always fails.
    full = Path("/proc/self/out")
    with pytest.raises((WriteFailed, OutOfSpace)):
        save(form, STATE, full, force=False)
