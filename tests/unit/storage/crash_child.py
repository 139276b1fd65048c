"""Run by test_storage_crash.py: one sequence of operations, in a process that may be killed."""

import sys
from pathlib import Path

from everstep.proto.errors import OutOfSpace, WriteFailed
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel


def nvme_sequence(root: Path, take) -> None:
    """Step 5 is taken again by incarnation 2, a layout comes to it, then step 4 goes."""
    with NvmeLevel(root, chunk_bytes=1 << 20) as nvme:
        again = take(2, 5)
        again.save(nvme)
        nvme.delete("job", take(1, 4).id)


def memory_sequence(root: Path, take) -> None:
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


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import Take

    sequence = {"nvme": nvme_sequence, "memory": memory_sequence}[sys.argv[1]]
    try:
        sequence(Path(sys.argv[2]), Take)
    except (OutOfSpace, WriteFailed) as error:
        print(type(error).__name__)
    else:
        print("done")


main()
