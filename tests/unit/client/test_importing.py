"""What is read of a checkpoint: every form of it, never anything that it wants executed."""

import json
import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed import checkpoint

from everstep.client.importing.dcp_directory import read_dcp
from everstep.client.importing.parts import StateDict, about, chosen, part_of
from everstep.client.importing.pickled import unpickled
from everstep.client.importing.safetensors_files import read_safetensors
from everstep.client.importing.sources import Chunks, Later, format_of
from everstep.client.importing.torch_file import read_torch
from everstep.proto.errors import EverstepError, FormatInvalid, Refused

from .located import as_bytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"
)


class Executed:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.trace),)


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    shared = torch.randn(4, 3)
    return {
        "w": shared,
        "tied": shared,
        "half": torch.randn(5).bfloat16(),
        "one": torch.tensor(7),
        "none": torch.empty(0, 2),
        "turned": torch.randn(3, 2).t(),
        "words": torch.tensor([1, 2**40], dtype=torch.uint64),
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert as_bytes(found[name]) == as_bytes(tensor), name


def read_now(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {key: read_now(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [read_now(item) for item in thing]
    return thing.read() if isinstance(thing, Later) else thing


def test_a_pickle_is_read_as_data() -> None:
    thing = {"a": [1, -2, 2**70, 1.5, None, True, b"x"], ("t", 1): {"s"}, "o": OrderedDict(k="v")}
    calls = [("_codecs", "encode"), ("__builtin__", "set"), ("builtins", "set")]
    allowed = [("collections", "OrderedDict"), *calls]
    for protocol in (2, 3, 4, 5):
        found = unpickled(pickle.dumps(thing, protocol=protocol), allowed, "here")
        assert found.keys() == thing.keys()
        if protocol > 3:  # bytes or sets are calls before
            assert found == thing


def test_a_pickle_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    for protocol in (2, 4):
        data = pickle.dumps({"a": Executed(tmp_path / "trace")}, protocol=protocol)
        with pytest.raises(FormatInvalid, match=r"posix\.mkdir"):
            unpickled(data, [("torch", "Size")], "here")
    assert not (tmp_path / "trace").exists()
    # Even where a name is allowed, nothing is called.
    unpickled(data, [("posix", "mkdir")], "here")
    assert not (tmp_path / "trace").exists()


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_pickle_is_one_of_our_errors(noise: bytes, at: int, byte: int) -> None:
    data = bytearray(pickle.dumps({"a": [1, (2, torch.Size([3]))], "b": OrderedDict(c=1)}))
    data[at % len(data)] = byte
    for damaged in (noise, bytes(data), bytes(data[: at % len(data)])):
        try:
            unpickled(damaged, [("torch", "Size"), ("collections", "OrderedDict")], "here")
        except FormatInvalid:
            pass


def test_opcodes_that_hosts_write_are_known() -> None:
    data = pickle.dumps(checkpoint.metadata.StorageMeta(checkpoint_id=Path("x")), protocol=4)
    assert {op.name for op, _, _ in pickletools.genops(data)} >= {"NEWOBJ", "STACK_GLOBAL"}


def test_safetensors_by_file_and_by_index(tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in model().items() if name != "tied"}
    save_file(whole, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert format_of(source) == "safetensors"
        assert_equal(read_safetensors(source), whole)
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(whole)}
    for file in set(files.values()):
        save_file({n: t for n, t in whole.items() if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for source in (tmp_path, index):
        assert format_of(source) == "safetensors"
        assert_equal(read_safetensors(source), whole)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FormatInvalid, match="model-1"):
        read_safetensors(index)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "b/c", 7])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatInvalid, match="name of a file"):
        read_safetensors(index)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        [],
    ],
)
def test_a_header_that_lies_is_one_of_our_errors(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(FormatInvalid):
        read_safetensors(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", b"a" * 50])
def test_what_is_no_safetensors_is_one_of_our_errors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    try:
        assert read_safetensors(path) == {}
    except FormatInvalid:
        pass


def test_torch_files_are_mapped_and_never_executed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(model(), path)
    assert format_of(path) == "torch"
    found = read_torch(path)
    assert_equal(found, model())
    assert found["w"].data_ptr() == found["tied"].data_ptr()
    torch.save({"w": torch.ones(2), "evil": Executed(tmp_path / "trace")}, path)
    with pytest.raises(Refused, match="state_dict"):
        read_torch(path)
    assert not (tmp_path / "trace").exists()


def test_old_torch_files_and_others_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("hello, world")
    for name in ("old.pt", "text", "missing"):
        with pytest.raises(Refused, match="imported"):
            format_of(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="metadata"):
        format_of(tmp_path / "empty")


def save_dcp(state: dict[str, Any], output: Path) -> None:
    checkpoint.save(state, checkpoint_id=output, no_dist=True)


def test_dcp_is_read_as_it_was_nested(tmp_path: Path) -> None:
    state = {
        "model": model(),
        "list": [torch.ones(2), {"a": torch.zeros(1)}],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "epoch": 3,
        "names": ["a", "b"],
    }
    save_dcp(state, tmp_path / "dcp")
    assert format_of(tmp_path / "dcp") == "dcp"
    found = read_now(read_dcp(tmp_path / "dcp"))
    assert list(found) == list(state)
    assert_equal(found["model"], model())
    assert (found["epoch"], found["names"]) == (3, ["a", "b"])
    assert found["list"][0].tolist() == [1, 1]
    assert found["list"][1]["a"].tolist() == [0]
    assert found["parameter"].tolist() == [1, 1, 1]


def test_a_value_that_would_execute_something_is_refused_only_if_it_is_wanted(
    tmp_path: Path,
) -> None:
    save_dcp({"model": model(), "evil": Executed(tmp_path / "trace")}, tmp_path / "dcp")
    tree = read_dcp(tmp_path / "dcp")
    assert part_of("model", chosen(tree, ["model"])["model"]).tensors == len(model())
    with pytest.raises(Refused, match="--part"):
        part_of("loose", chosen(tree, [])["loose"])
    assert not (tmp_path / "trace").exists()


def test_metadata_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    save_dcp({"model": model()}, tmp_path / "dcp")
    metadata = tmp_path / "dcp/.metadata"
    metadata.write_bytes(pickle.dumps(Executed(tmp_path / "trace")))
    with pytest.raises(FormatInvalid, match=r"posix\.mkdir"):
        read_dcp(tmp_path / "dcp")
    assert not (tmp_path / "trace").exists()


def test_metadata_that_lies_is_one_of_our_errors(tmp_path: Path) -> None:
    save_dcp({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "dcp")
    path = tmp_path / "dcp/.metadata"
    good = path.read_bytes()

    def changed(change: Callable[[Any], None]) -> None:
        metadata = pickle.loads(good)
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    def only(mapping: dict[Any, Any]) -> Any:
        (value,) = mapping.values()
        return value

    def tensor(metadata: Any) -> Any:
        return only(metadata.state_dict_metadata)

    def stored(metadata: Any) -> Any:
        return only(metadata.storage_data)

    lies: list[Callable[[Any], None]] = [
        lambda m: setattr(stored(m), "relative_path", "../dcp/__0_0.distcp"),
        lambda m: setattr(stored(m), "relative_path", "/etc/passwd"),
        lambda m: setattr(stored(m), "relative_path", "absent"),
        lambda m: setattr(stored(m), "offset", 5),
        lambda m: setattr(stored(m), "offset", -5),
        lambda m: setattr(stored(m), "length", 1 << 40),
        lambda m: setattr(stored(m), "length", 10),
        lambda m: setattr(tensor(m), "size", torch.Size([3, 3])),
        lambda m: setattr(tensor(m), "chunks", []),
        lambda m: setattr(tensor(m).chunks[0], "sizes", torch.Size([2])),
        lambda m: setattr(tensor(m).chunks[0], "offsets", torch.Size([1, 0])),
        lambda m: setattr(tensor(m).properties, "dtype", torch.int32),
        lambda m: m.storage_data.clear(),
        lambda m: setattr(m, "state_dict_metadata", None),
        lambda m: m.planner_data.update(w=("a", ("b",))),
    ]
    for number, lie in enumerate(lies):
        changed(lie)
        try:
            read_now(read_dcp(tmp_path / "dcp"))
        except FormatInvalid:
            continue
        pytest.fail(f"lie {number} was believed")
    changed(lambda m: setattr(stored(m), "transform_descriptors", ["zstd"]))
    with pytest.raises(Refused, match="transformed"):
        read_now(read_dcp(tmp_path / "dcp"))


def test_a_damaged_dcp_file_is_one_of_our_errors_or_other_numbers(tmp_path: Path) -> None:
    save_dcp({"w": torch.arange(6.0)}, tmp_path / "dcp")
    path = tmp_path / "dcp/__0_0.distcp"
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            found = read_now(read_dcp(tmp_path / "dcp"))["w"]
        except EverstepError:
            continue
        assert (found.dtype, found.shape) == (torch.float32, (6,))


def test_a_state_dict_is_a_module_and_the_rest_are_trees() -> None:
    flat = model()
    assert list(chosen(flat, [])) == ["model"]
    part = part_of("model", flat)
    assert (part.kind, part.tensors) == ("module", len(flat))
    assert isinstance(part.target, StateDict)
    nested = {"net": flat, "optim": {"state": {0: {"m": torch.ones(1)}}}, "epoch": 3, "lr": 0.1}
    found = {name: part_of(name, tree) for name, tree in chosen(nested, []).items()}
    assert {name: part.kind for name, part in found.items()} == {
        "net": "module",
        "optim": "tree",
        "loose": "tree",
    }
    assert found["loose"].target == {"epoch": 3, "lr": 0.1}


def test_parts_are_chosen_by_their_place() -> None:
    nested = {"state": {"net": model()}, "ema": model()}
    found = chosen(nested, ["model=state/net", "ema"])
    assert found["model"] is nested["state"]["net"]
    assert found["ema"] is nested["ema"]
    assert chosen(model(), ["policy"]).keys() == {"policy"}
    for wrong in (["model=state/other"], ["model=state/net/w"], ["ema", "ema=state"]):
        with pytest.raises(Refused):
            chosen(nested, wrong)
    for tree in ({"n": 1}, torch.ones(1), {"two words": model()}):
        with pytest.raises(Refused, match="imported"):
            chosen(tree, [])


def test_chunks_are_placed_in_their_tensor() -> None:
    parts = (((0, 0), torch.ones(1, 2)), ((1, 0), torch.zeros(2, 2)))
    part = part_of("model", {"w": Chunks((3, 2), parts), "b": torch.ones(1)})
    state = part.target.state_dict()
    placed = [part.place("", tensor) for tensor in (state["w"], state["b"])]
    assert placed[0] is not None
    assert (placed[0][0].tensor, placed[0][0].global_shape) == ("model/w", (3, 2))
    assert placed[1] is None
    (further,) = state["everstep.chunks"].values()
    extent, nothing = part.place("", further) or ()
    assert nothing.shape == (0, 2)
    assert extent.offset == (1, 0)
    assert (part.tensors, part.nbytes) == (2, 28)


def test_only_an_export_of_ours_says_its_step() -> None:
    ours = {"job": "a", "step": 9, "producer": "everstep"}
    assert about({"everstep": ours, "rng": {"torch": b""}})[0]["step"] == 9
    assert about({"everstep": 3}) == ({}, {})
    assert about({"everstep": {"step": 9}}) == ({}, {})
