"""Where each tensor lies in a shard's image: the part of a shard that does not change by step.

An image is a safetensors file: 8 bytes of header length, a JSON header padded with spaces so that
the data begins at a multiple of 4096, then the leaves by descending element size, within one size
the larger first, then by name; no gaps, so each is aligned to its element size. A range of a tensor
is a one-dimensional entry ``name[start:stop]``, counted in elements; an empty one has no entry. A
block of a tensor that is spread over ranks is named ``name[begin:end,begin:end]``. Types that
safetensors 0.5 does not know are stored as the same bytes of another type: complex numbers as pairs
of their real type, other 8-bit floats as U8. `Layout.leaves` keeps the order in which the leaves
were given, since the order of dict keys follows from it; offsets tell the order in the image.

Promises that equal arguments give equal images and ids, and that what `decode` returns is
consistent: leaves do not overlap, fill the image, and have the bytes that shape and type ask for.
Does not know any step, touch any tensor, or check that names are paths (see snapshot/tree.py).
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from everstep.proto import envelope, state_pb2
from everstep.proto.errors import FormatInvalid, NotCapturable

ALIGNMENT_BYTES = 4096
MAX_IMAGE_BYTES = 1 << 48
MAX_GLOBAL_ELEMENTS = 1 << 62
MAX_LEAVES = 1 << 20
MAX_DIMENSIONS = 64
MAX_HEADER_BYTES = 100_000_000  # safetensors refuses longer headers
PART_KINDS = frozenset({"module", "optimizer", "stateful", "tree"})

_METADATA = {"format": "pt", "everstep": "1"}
# torch's name: bytes of an element, type in the file, lengths that follow the shape in the file.
_DTYPES: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "complex128": (16, "F64", (2,)),
    "complex64": (8, "F32", (2,)),
    "float64": (8, "F64", ()),
    "int64": (8, "I64", ()),
    "uint64": (8, "U64", ()),
    "complex32": (4, "F16", (2,)),
    "float32": (4, "F32", ()),
    "int32": (4, "I32", ()),
    "uint32": (4, "U32", ()),
    "float16": (2, "F16", ()),
    "bfloat16": (2, "BF16", ()),
    "int16": (2, "I16", ()),
    "uint16": (2, "U16", ()),
    "int8": (1, "I8", ()),
    "uint8": (1, "U8", ()),
    "bool": (1, "BOOL", ()),
    "float8_e4m3fn": (1, "F8_E4M3", ()),
    "float8_e5m2": (1, "F8_E5M2", ()),
    "float8_e4m3fnuz": (1, "U8", ()),
    "float8_e5m2fnuz": (1, "U8", ()),
    "float8_e8m0fnu": (1, "U8", ()),
    "float4_e2m1fn_x2": (1, "U8", ()),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One attached object.

    Attributes:
        name: As given to attach().
        kind: One of `PART_KINDS`.
        class_name: Fully qualified.
        per_rank: Whether it is expected to differ between ranks.
    """

    name: str
    kind: str
    class_name: str
    per_rank: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Where a leaf lies, that is a box of a larger tensor. The box's lengths are the leaf's shape.

    Attributes:
        tensor: The tensor's name, the same on all ranks.
        global_shape: The tensor's.
        offset: Of the box's first element, in each dimension.
    """

    tensor: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """A tensor, or a range of its bytes, that is to get a place.

    Attributes:
        name: Its path.
        dtype: torch's name without "torch.".
        shape: Of the whole tensor, or of the block.
        start: First byte of it that is held here.
        stop: One past the last.
        replicated: Whether it is equal on a group of ranks, each holding a range.
        block: Of which tensor it is a box; None if it is a tensor of its own.
        group: If replicated, the id of that group (`snapshot/samples.py`); 0: all ranks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    replicated: bool = False
    block: Block | None = None
    group: int = 0


@dataclass(frozen=True, slots=True)
class Leaf:
    """A `LeafSpec` with its place.

    Attributes:
        offset: Of the first byte held here, from the start of the image.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int
    replicated: bool
    block: Block | None = None
    group: int = 0

    @property
    def held_bytes(self) -> int:
        """How many bytes of it lie in this image."""
        return self.stop - self.start

    @property
    def whole_bytes(self) -> int:
        """How many bytes the tensor has, or the block."""
        return math.prod(self.shape) * element_bytes(self.dtype)

    @property
    def tensor(self) -> str:
        """The name of the tensor that it is, or is a box of."""
        return self.name if self.block is None else self.block.tensor

    @property
    def global_shape(self) -> tuple[int, ...]:
        """That tensor's shape."""
        return self.shape if self.block is None else self.block.global_shape

    @property
    def block_offset(self) -> tuple[int, ...]:
        """Where it begins in that tensor."""
        return (0,) * len(self.shape) if self.block is None else self.block.offset


@dataclass(frozen=True, slots=True)
class Layout:
    """The description of an image.

    Attributes:
        parts: The attached objects.
        leaves: In the order of the state tree, not of the image.
        aliases: Further names of leaves (tied weights), to the leaf's name.
        containers: See snapshot/tree.py.
        image_bytes: Length of the image, header included.
        header: The first bytes of the image, up to the first leaf.
        layout_id: Hexadecimal digest of all of this.
    """

    parts: tuple[Part, ...]
    leaves: tuple[Leaf, ...]
    aliases: dict[str, str]
    containers: dict[str, str]
    image_bytes: int
    header: bytes
    layout_id: str


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a torch dtype, named without "torch."; KeyError if unknown."""
    return _DTYPES[dtype][0]


def knows(dtype: str) -> bool:
    """Whether tensors of this dtype can be stored."""
    return dtype in _DTYPES


def pack(
    parts: Sequence[Part],
    tensors: Sequence[LeafSpec],
    aliases: Mapping[str, str],
    containers: Mapping[str, str],
) -> Layout:
    """Give every leaf its place.

    Raises:
        NotCapturable: If a dtype cannot be stored.
        FormatInvalid: If the arguments contradict each other or exceed a limit.
    """
    for spec in tensors:
        if spec.dtype not in _DTYPES:
            raise NotCapturable(spec.name, f"tensor of dtype {spec.dtype}")

    def place(index: int) -> tuple[int, int, str]:
        spec = tensors[index]
        return -element_bytes(spec.dtype), spec.start - spec.stop, spec.name

    offsets = [0] * len(tensors)
    end = 0
    for index in sorted(range(len(tensors)), key=place):
        offsets[index] = end
        end += tensors[index].stop - tensors[index].start
    leaves = [
        Leaf(s.name, s.dtype, s.shape, offset, s.start, s.stop, s.replicated, s.block, s.group)
        for s, offset in zip(tensors, offsets, strict=True)
    ]
    where = "a new layout"
    _check_leaves(leaves, where)
    data_start = len(_header(leaves, 0, 0, where))
    leaves = [replace(leaf, offset=data_start + leaf.offset) for leaf in leaves]
    image_bytes = data_start + end
    body = _message(parts, leaves, aliases, containers, image_bytes).SerializeToString(
        deterministic=True
    )
    return _checked(parts, leaves, aliases, containers, image_bytes, body, where)


def encode(layout: Layout, *, repairable: bool = False) -> bytes:
    """The layout in an envelope, for the wire, or with `repairable` for a file."""
    message = _message(
        layout.parts, layout.leaves, layout.aliases, layout.containers, layout.image_bytes
    )
    return envelope.seal(
        "layout", message.SerializeToString(deterministic=True), repairable=repairable
    )


def decode(data: bytes | memoryview, where: str) -> Layout:
    """The layout in an envelope, with everything about it checked.

    Raises:
        FormatInvalid: If it is damaged or not consistent.
    """
    body = envelope.open_envelope("layout", data, where)
    try:
        message = state_pb2.Layout.FromString(body)
    except DecodeError as error:
        raise FormatInvalid(where, f"not a layout ({error})") from error
    if len(message.leaves) > MAX_LEAVES:
        raise FormatInvalid(where, f"{len(message.leaves)} leaves are over the limit")
    parts = [Part(part.name, part.kind, part.class_name, part.per_rank) for part in message.parts]
    leaves = [_leaf(leaf) for leaf in message.leaves]
    _check_unique("alias", (alias.name for alias in message.aliases), where)
    _check_unique("container", (container.path for container in message.containers), where)
    aliases = {alias.name: alias.of for alias in message.aliases}
    containers = {container.path: container.kind for container in message.containers}
    _check_leaves(leaves, where)
    return _checked(parts, leaves, aliases, containers, message.image_bytes, body, where)


def _leaf(message: state_pb2.Leaf) -> Leaf:
    return Leaf(
        message.name,
        message.dtype,
        tuple(message.shape),
        message.offset,
        message.start,
        message.stop,
        message.replicated,
        _block(message),
        message.group,
    )


def _block(message: state_pb2.Leaf) -> Block | None:
    shape, offset = tuple(message.global_shape), tuple(message.block_offset)
    return Block(message.tensor, shape, offset) if message.tensor or shape or offset else None


def _message(
    parts: Iterable[Part],
    leaves: Iterable[Leaf],
    aliases: Mapping[str, str],
    containers: Mapping[str, str],
    image_bytes: int,
) -> state_pb2.Layout:
    return state_pb2.Layout(
        parts=[
            state_pb2.Part(
                name=part.name,
                kind=part.kind,
                class_name=part.class_name,
                per_rank=part.per_rank,
            )
            for part in parts
        ],
        leaves=[
            state_pb2.Leaf(
                name=leaf.name,
                dtype=leaf.dtype,
                shape=leaf.shape,
                offset=leaf.offset,
                start=leaf.start,
                stop=leaf.stop,
                replicated=leaf.replicated,
                tensor=leaf.block.tensor if leaf.block else "",
                global_shape=leaf.block.global_shape if leaf.block else (),
                block_offset=leaf.block.offset if leaf.block else (),
                group=leaf.group,
            )
            for leaf in leaves
        ],
        aliases=[state_pb2.Alias(name=name, of=of) for name, of in aliases.items()],
        containers=[state_pb2.Container(path=path, kind=kind) for path, kind in containers.items()],
        image_bytes=image_bytes,
    )


def _checked(
    parts: Sequence[Part],
    leaves: Sequence[Leaf],
    aliases: Mapping[str, str],
    containers: Mapping[str, str],
    image_bytes: int,
    body: bytes,
    where: str,
) -> Layout:
    _check_unique("part", (part.name for part in parts), where)
    _check_unique("name", (*(leaf.name for leaf in leaves), *aliases), where)
    names = {leaf.name for leaf in leaves}
    for part in parts:
        if part.kind not in PART_KINDS:
            raise FormatInvalid(where, f"part {part.name[:80]!r} is of an unknown kind")
    for name, of in aliases.items():
        if of not in names:
            raise FormatInvalid(where, f"{name[:80]!r} stands for {of[:80]!r}, which is missing")
    data_start = min((leaf.offset for leaf in leaves), default=image_bytes)
    _check_places(leaves, data_start, image_bytes, where)
    header = _header(leaves, data_start, data_start, where)
    if len(header) != data_start:
        raise FormatInvalid(where, f"{data_start} bytes are no place for its header")
    layout_id = hashlib.blake2b(body, digest_size=16).hexdigest()
    return Layout(
        tuple(parts), tuple(leaves), dict(aliases), dict(containers), image_bytes, header, layout_id
    )


def _check_unique(what: str, names: Iterable[str], where: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise FormatInvalid(where, f"the {what} {name[:80]!r} occurs {count} times")


def _check_leaves(leaves: Sequence[Leaf], where: str) -> None:
    if len(leaves) > MAX_LEAVES:
        raise FormatInvalid(where, f"{len(leaves)} leaves are over the limit of {MAX_LEAVES}")
    for leaf in leaves:
        problem = _leaf_problem(leaf)
        if problem:
            raise FormatInvalid(where, f"leaf {leaf.name[:80]!r} {problem}")


def _leaf_problem(leaf: Leaf) -> str:
    if leaf.dtype not in _DTYPES:
        return f"is of unknown type {leaf.dtype[:80]!r}; a newer Everstep may know it"
    if len(leaf.shape) > MAX_DIMENSIONS or any(length < 0 for length in leaf.shape):
        return "has an impossible shape"
    # Zeros count as one: readers multiply from the left and refuse an overflow before the zero.
    if math.prod(max(1, length) for length in leaf.shape) > MAX_IMAGE_BYTES:
        return "has an impossible shape"
    element = element_bytes(leaf.dtype)
    if not 0 <= leaf.start <= leaf.stop <= leaf.whole_bytes:
        return f"has bytes {leaf.start} to {leaf.stop}, but {leaf.whole_bytes} in all"
    if leaf.start % element or leaf.stop % element:
        return "is cut inside an element"
    if not leaf.replicated and leaf.held_bytes != leaf.whole_bytes:
        return "is not replicated, and yet not whole"
    if not leaf.replicated and leaf.group:
        return "is not replicated, and yet of a group"
    return _block_problem(leaf) if leaf.block is not None else ""


def _block_problem(leaf: Leaf) -> str:
    whole, offset = leaf.global_shape, leaf.block_offset
    if not leaf.tensor or len({len(leaf.shape), len(whole), len(offset)}) != 1:
        return "is a block of a tensor without a name, or with another number of dimensions"
    if math.prod(max(1, length) for length in whole) > MAX_GLOBAL_ELEMENTS:
        return "is a block of a tensor of an impossible shape"
    if any(
        begin + length > end for begin, length, end in zip(offset, leaf.shape, whole, strict=True)
    ):
        return f"is a block at {list(offset)} of {list(leaf.shape)}, outside of {list(whole)}"
    return ""


def _check_places(leaves: Sequence[Leaf], data_start: int, image_bytes: int, where: str) -> None:
    if image_bytes > MAX_IMAGE_BYTES:
        raise FormatInvalid(where, f"an image of {image_bytes} bytes is over the limit")
    if data_start > MAX_HEADER_BYTES + ALIGNMENT_BYTES:
        raise FormatInvalid(where, f"its data cannot begin at {data_start}")
    end = data_start
    for leaf in sorted(leaves, key=lambda leaf: (leaf.offset, leaf.held_bytes)):
        if leaf.offset != end or leaf.offset % element_bytes(leaf.dtype):
            raise FormatInvalid(where, f"leaf {leaf.name[:80]!r} cannot lie at {leaf.offset}")
        end += leaf.held_bytes
    if end != image_bytes:
        raise FormatInvalid(where, f"its leaves end at {end}, the image at {image_bytes}")


def _header(leaves: Sequence[Leaf], data_start: int, fill_bytes: int, where: str) -> bytes:
    """The safetensors header with its length, padded to at least `fill_bytes`."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    for leaf in sorted(leaves, key=lambda leaf: (leaf.offset, leaf.held_bytes, leaf.name)):
        whole = leaf.held_bytes == leaf.whole_bytes
        if not whole and not leaf.held_bytes:
            continue
        element, stored_dtype, tail = _DTYPES[leaf.dtype]
        name, shape = leaf.name, leaf.shape
        if leaf.block is not None:
            box = zip(leaf.block_offset, leaf.shape, strict=True)
            name = f"{leaf.tensor}[{','.join(f'{at}:{at + length}' for at, length in box)}]"
        if not whole:
            name = f"{name}[{leaf.start // element}:{leaf.stop // element}]"
            shape = (leaf.held_bytes // element,)
        while name in entries:
            name += "~"  # a tensor may be named like the range of another, or like the metadata
        begin = leaf.offset - data_start
        entries[name] = {
            "dtype": stored_dtype,
            "shape": [*shape, *tail],
            "data_offsets": [begin, begin + leaf.held_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_HEADER_BYTES - ALIGNMENT_BYTES:
        raise FormatInvalid(where, f"a header of {len(text)} bytes is over the limit")
    total = max(8 + len(text), fill_bytes)
    total += -total % ALIGNMENT_BYTES
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
