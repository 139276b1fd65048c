"""Where a node keeps parity: the common face of both places, and the values that pass through it.

Owns the contract `ParityStore`, which the suite in tests/contract/test_parity_store.py holds every
store to, and what a stored manifest must say to be believed. Parity is bytes here: what they are
computed from, and what can be computed from them, is the agent's and `erasure`'s.

The stores: `parity_memory.ParityMemory`, which outlives every process, and
`parity_nvme.ParityNvme`, which outlives power loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope
from everstep.proto.errors import FormatInvalid, InvalidName
from everstep.proto.ids import UNIT_BYTES, SnapshotId, checked_name
from everstep.storage.identity import DIGEST_BYTES, unit_count
from everstep.storage.level import Problem, ShardImage

MAX_PARITY_BYTES = 1 << 44
"""No member's parity is larger; a manifest that claims more is damaged."""


@dataclass(slots=True)
class ParityImage(ShardImage):
    """A member's parity of one plan, mapped on demand; `record` is its manifest's plain envelope.

    A bulk server may send ranges of `path` from `offset` on, `image.nbytes` of them.
    """

    manifest: state_pb2.ParityManifest = field(default_factory=state_pb2.ParityManifest)
    """What the bytes are."""


class ParityStore(Protocol):
    """A place where a node's parity lives, by job and plan.

    All methods may be called from any thread. Two threads must not write or delete the same plan.
    Every method raises `InvalidName` for a job or a plan id that is not harmless as a path
    component.
    """

    def manifests(self, job: str) -> list[state_pb2.ParityManifest]:
        """The manifests of the parity that is here in full length, by snapshot, then plan id.

        Damaged ones are left out, and are in `problems`. An unknown job has none.
        """

    def open(self, job: str, plan_id: str) -> ParityImage:
        """Map the parity of a plan, read-only. Its bytes have not been verified.

        Raises:
            FormatInvalid: If it is missing, damaged, too short or of another plan.
        """

    def verify(self, job: str, plan_id: str) -> Sequence[int]:
        """The units that do not match their digest or cannot be read; empty if all is whole.

        Raises:
            FormatInvalid: As `open`.
        """

    def delete(self, job: str, plan_id: str) -> None:
        """Remove the parity of a plan; its manifest goes first. Removing none is a no-op.

        Raises:
            WriteFailed: If the device fails.
        """

    def sweep(self, job: str) -> list[str]:
        """Clear what interrupted writes left behind, and say what was done. Only at a start."""

    def problems(self, job: str) -> list[Problem]:
        """What is stored of this job's parity and cannot be used. Never raises for a bad file."""


def parse_manifest(envelope: bytes, where: str) -> state_pb2.ParityManifest:
    """Open a manifest's envelope.

    Checks what a store relies on: names that are harmless, and digests for each unit. What the
    plan says of members and rows is for whoever computes with it to check.

    Raises:
        FormatInvalid: If it is damaged, or its numbers contradict each other.
    """
    manifest = state_pb2.ParityManifest()
    try:
        manifest.ParseFromString(open_envelope("parity_manifest", envelope, where))
        checked_name("job", manifest.plan.job)
        checked_name("plan", manifest.plan.plan_id)
    except DecodeError as error:
        raise FormatInvalid(where, f"its parity manifest cannot be parsed: {error}") from error
    except InvalidName as error:
        raise FormatInvalid(where, str(error)) from error
    if manifest.plan.unit_bytes != UNIT_BYTES:
        raise FormatInvalid(
            where, f"its units have {manifest.plan.unit_bytes} bytes, not {UNIT_BYTES}"
        )
    if manifest.member >= len(manifest.plan.members):
        raise FormatInvalid(where, f"member {manifest.member} is not in its plan")
    length_bytes = parity_bytes(manifest)
    wanted_bytes = unit_count(length_bytes) * DIGEST_BYTES
    if length_bytes > MAX_PARITY_BYTES or len(manifest.unit_digests) != wanted_bytes:
        raise FormatInvalid(where, "the number of unit digests does not fit the parity's length")
    return manifest


def parity_bytes(manifest: state_pb2.ParityManifest) -> int:
    """How long this member's parity is."""
    return manifest.parity_bytes or len(manifest.unit_digests) // DIGEST_BYTES * UNIT_BYTES


def protected_snapshot(manifest: state_pb2.ParityManifest) -> SnapshotId:
    """The snapshot whose shards the parity is of."""
    return SnapshotId(manifest.plan.incarnation, manifest.plan.step)


def check_plan(manifest: state_pb2.ParityManifest, job: str, plan_id: str, where: str) -> None:
    """Check that a manifest is of this job and plan.

    Raises:
        FormatInvalid: If it is of another.
    """
    found = manifest.plan
    if (found.job, found.plan_id) != (job, plan_id):
        raise FormatInvalid(
            where,
            f"it is of job {found.job!r}, plan {found.plan_id!r}, not of job {job!r}, "
            f"plan {plan_id!r}",
        )


def check_parity_bytes(manifest: state_pb2.ParityManifest, found_bytes: int, where: str) -> None:
    """Check that as many bytes are there as a manifest says.

    Raises:
        FormatInvalid: If there are fewer or more.
    """
    if found_bytes != parity_bytes(manifest):
        raise FormatInvalid(
            where,
            f"the parity has {found_bytes} bytes, its manifest says {parity_bytes(manifest)}",
        )


def by_snapshot(manifest: state_pb2.ParityManifest) -> tuple[SnapshotId, str]:
    """The order in which manifests are listed."""
    return protected_snapshot(manifest), manifest.plan.plan_id
