"""What is copied when, and that a torn copy is noticed."""

import threading
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load

from everstep.kernels.digest import digest_units
from everstep.proto import failpoint
from everstep.proto.errors import NotCapturable
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import capture as capturing
from everstep.snapshot.capture import Capture
from everstep.snapshot.capture_plan import (
    SMALL_BYTES,
    CapturePlan,
    check_capturable,
    dtype_name,
    identity,
    is_plain,
    value_bytes,
)
from everstep.snapshot.layout import Layout, LeafSpec, Part, pack

Tensors = dict[str, torch.Tensor]
BIG = SMALL_BYTES // 4


def layout_of(tensors: Tensors, ranges: dict[str, tuple[int, int]] | None = None) -> Layout:
    specs = []
    for name, tensor in tensors.items():
        start, stop = (ranges or {}).get(name, (0, tensor.nbytes))
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        specs.append(LeafSpec(name, dtype, shape, start, stop, name in (ranges or {})))
    return pack([Part("t", "tree", "builtins.dict")], specs, {}, {})


def plan_of(
    tensors: Tensors, *, guarded: bool = True, ranges: dict[str, tuple[int, int]] | None = None
) -> CapturePlan:
    return CapturePlan(layout_of(tensors, ranges), tensors, frozenset(tensors if guarded else ()))


def begun(plan: CapturePlan) -> tuple[Capture, bytearray]:
    # Filled with rubbish, as a slot is that was used before.
    slot = bytearray(b"\xa5" * plan.layout.image_bytes)
    capture = Capture(plan, memoryview(slot), seed=7)
    capture.begin()
    return capture, slot


def bits(tensor: torch.Tensor) -> bytes:
    return value_bytes(tensor).numpy().tobytes()


def test_only_large_guarded_plain_leaves_are_lazy() -> None:
    tensors = {
        "t/big": torch.randn(BIG),
        "t/small": torch.randn(BIG - 1),
        "t/strided": torch.randn(BIG, 2)[:, 0],
        "t/conjugated": torch.randn(BIG, dtype=torch.complex64).conj(),
        "t/empty": torch.empty(0),
    }
    plan = plan_of(tensors)
    assert [source.leaf.name for source in plan.lazy] == ["t/big"]
    assert [source.leaf.name for source in plan.at_once] == ["t/small"]
    assert {s.leaf.name for s in plan.by_torch} == {"t/strided", "t/conjugated"}
    assert plan_of(tensors, guarded=False).lazy == []


def test_an_image_is_a_safetensors_file_with_its_digests() -> None:
    tensors = {
        "t/a": torch.randn(3 * UNIT_BYTES // 4 + 5),
        "t/b": torch.randn(100, 70).t(),
        "t/c": torch.tensor(3),
        "t/d": torch.randn(5).bfloat16(),
        "t/e": torch.empty(0, 4),
    }
    capture, slot = begun(plan_of(tensors))
    assert not capture.done.is_set()
    assert capture.finish(10)
    assert capture.complete
    assert not capture.torn
    assert bytes(capture.digests) == digest_units(slot, UNIT_BYTES)
    image = load(bytes(slot))
    assert {name: bits(tensor) for name, tensor in image.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_what_is_not_lazy_is_copied_before_begin_returns() -> None:
    tensors = {"t/at once": torch.randn(BIG), "t/strided": torch.randn(BIG, 2)[:, 0]}
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    capture, slot = begun(plan_of(tensors, guarded=False))
    for tensor in tensors.values():
        tensor.zero_()
    capture.finish(10)
    assert not capture.torn
    assert {name: bits(tensor) for name, tensor in load(bytes(slot)).items()} == before


@pytest.mark.parametrize("plain", [True, False])
def test_a_range_of_a_leaf(plain: bool) -> None:
    """A replica's share: bytes of the value, whatever the memory looks like."""
    whole = torch.randn(64, 80) if plain else torch.randn(80, 64).t()
    ranges = {"t/x": (4096, 12288)}
    capture, slot = begun(plan_of({"t/x": whole}, ranges=ranges))
    capture.finish(10)
    (part,) = load(bytes(slot)).values()
    assert bits(part) == bits(whole)[4096:12288]


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "one element in place": lambda t: t[BIG : BIG + 1].add_(1),
    "unseen by the version": lambda t: t.data.add_(1),
    "through numpy": lambda t: t.numpy().fill(3),
    "first element unseen": lambda t: t.data[:1].add_(1),
    "last element unseen": lambda t: t.data[-1:].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_before_the_fence_is_noticed(write: str) -> None:
    tensors = {"t/x": torch.randn(4 * BIG), "t/y": torch.randn(4 * BIG)}
    capture, _ = begun(plan_of(tensors))
    WRITES[write](tensors["t/x"])
    capture.finish(10)
    assert capture.torn == ("t/x",)


def test_a_write_after_the_fence_is_not() -> None:
    tensors = {"t/x": torch.randn(4 * BIG)}
    before = bits(tensors["t/x"])
    capture, slot = begun(plan_of(tensors))
    capture.finish(10)
    tensors["t/x"].zero_()
    assert capture.torn == ()
    assert bits(load(bytes(slot))["t/x"]) == before


def test_threads_share_the_work() -> None:
    tensors = {f"t/{i}": torch.randn(9 * UNIT_BYTES // 4) for i in range(4)}
    capture, slot = begun(plan_of(tensors))
    threads = [threading.Thread(target=capture.finish, args=(10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capture.complete
    assert bytes(capture.digests) == digest_units(slot, UNIT_BYTES)


def test_given_up_before_anything_was_copied() -> None:
    capture, _ = begun(plan_of({"t/x": torch.randn(BIG)}))
    capture.give_up()
    assert capture.done.is_set()
    assert not capture.advance()
    assert not capture.complete


def test_given_up_while_a_block_is_copied(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never complete, even if that block was the last; done only once it has ended."""
    at_block, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "client.capture.block":
            at_block.set()
            assert go_on.wait(30)

    capture, _ = begun(plan_of({"t/x": torch.randn(BIG)}))
    monkeypatch.setattr(capturing, "failpoint", hold)
    thread = threading.Thread(target=capture.advance)
    thread.start()
    assert at_block.wait(30)
    assert not capture.finish(0.01)
    capture.give_up()
    assert not capture.done.is_set()
    go_on.set()
    thread.join()
    assert capture.done.is_set()
    assert not capture.complete


def test_release_lets_go_of_the_slot() -> None:
    capture, slot = begun(plan_of({"t/x": torch.randn(BIG), "t/y": torch.randn(9, 9).t()}))
    capture.finish(10)
    capture.release()
    slot.append(0)  # a bytearray that is still exported refuses to grow


def test_identity_changes_with_the_memory() -> None:
    tensor = torch.randn(6, 6)
    others = [
        torch.randn(6, 6), tensor[:5], tensor.t(), tensor.view(torch.int32), tensor.view(36),
        tensor[1:],
    ]  # fmt: skip
    seen = {identity([other]) for other in [tensor, *others]}
    assert len(seen) == 1 + len(others)
    assert identity([tensor]) == identity([tensor.detach()])


def test_what_has_no_plain_bytes_is_refused() -> None:
    class Wrapped(torch.Tensor):
        pass

    refused = {
        "layout": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "subclass": torch.randn(3).as_subclass(Wrapped),
    }
    for detail, tensor in refused.items():
        with pytest.raises(NotCapturable, match=detail) as raised:
            check_capturable("a/b", tensor)
        assert raised.value.path == "a/b"
    for tensor in (
        torch.ones(1),
        torch.nn.Parameter(torch.ones(1)),
        torch.nn.Buffer(torch.ones(1)),
    ):
        check_capturable("a/b", tensor)


def test_value_bytes_are_those_of_the_value() -> None:
    cases = {
        "plain": (torch.arange(6.0), torch.arange(6.0)),
        "transposed": (torch.arange(6.0).reshape(2, 3).t(), torch.tensor([0.0, 3, 1, 4, 2, 5])),
        "conjugated": (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        "negated": (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        "scalar": (torch.tensor(3), torch.tensor([3])),
        "empty": (torch.empty(0, 3), torch.empty(0)),
        "a column of one": (torch.arange(6.0).reshape(1, 6).t()[:1], torch.tensor([0.0])),
    }
    for name, (tensor, expected) in cases.items():
        assert bits(tensor) == expected.contiguous().numpy().tobytes(), name
        assert value_bytes(tensor).dtype is torch.uint8


def test_is_plain() -> None:
    assert is_plain(torch.ones(2, 3))
    assert not is_plain(torch.ones(2, 3).t())
    assert not is_plain(torch.ones(2, dtype=torch.complex64).conj())
    assert not is_plain(torch.ones(1).expand(4))
    assert not is_plain(torch.empty(2, device="meta"))


def test_failpoints_are_off() -> None:
    assert capturing.failpoint is failpoint.failpoint
