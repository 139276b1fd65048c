"""Run by test_storage_crash.py: one sequence of operations, in a process that may be killed."""

import sys
from pathlib import Path

from everstep.proto.errors import OutOfSpace, WriteFailed
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory


def nvme_sequence(root: Path, take, parity) -> None:
    """Step 5 is taken again by incarnation 2, a layout comes to it, then step 4 goes."""
    with NvmeLevel(root, chunk_bytes=1 << 20) as nvme:
        again = take(2, 5)
        again.save(nvme)
        nvme.delete("job", take(1, 4).id)


def memory_sequence(root: Path, take, parity) -> None:
    """Slot 0 is freed and taken by the next step, then rank 0 gets a larger arena."""
    memory = MemoryLevel(root, keep_free_bytes=0)
    memory.write_membership("job", b"new")
    old, new = take(1, 4), take(1, 6)
    memory.put_layout("job", new.layout_id, new.layout)
    for rank in range(len(new.sizes)):
        memory.drop("job", rank, 1, 0)
    for rank in range(len(new.sizes)):
        (arena,) = (one for one in memory.arenas("job") if one.rank == rank)
        with memory.writable(arena, 0, new.sizes[rank]) as view:
            view[:] = new.image(rank)
        memory.publish("job", rank, 1, 0, new.record(rank))
    memory.reserve("job", 0, 2, slot_count=2, slot_bytes=1 << 20)
    memory.release("job", 0, 2)
    assert old.id not in memory.snapshots("job")


def parity_nvme_sequence(root: Path, take, parity) -> None:
    """Step 5 gets other parity, then the parity of step 6, alone there, goes; then step 5."""
    with NvmeLevel(root, chunk_bytes=1 << 20) as nvme:
        parity("p2").save(nvme)
        nvme.parity.delete("job", "q")
        nvme.delete("job", take(1, 5).id)


def parity_memory_sequence(root: Path, take, parity) -> None:
    """A free file of the pool becomes longer and takes p2; then p1 goes, and its file."""
    store = ParityMemory(root, keep_free_bytes=0)
    parity("p2", size=5 << 20).encode(store)
    store.delete("job", "p1")
    store.release_unused("job")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import Parity, Take

    sequence = {
        "nvme": nvme_sequence,
        "memory": memory_sequence,
        "parity-nvme": parity_nvme_sequence,
        "parity-memory": parity_memory_sequence,
    }[sys.argv[1]]
    try:
        sequence(Path(sys.argv[2]), Take, Parity)
    except (OutOfSpace, WriteFailed) as error:
        print(type(error).__name__)
    else:
        print("done")


main()
