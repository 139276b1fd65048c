"""What the trainer's environment says: its rank, its launch, and where the agent is.

Owns the only look that the client takes at the environment. Promises that explicit arguments win,
that a malformed value is an error which names its variable, and that all ranks of one launch get
the same `launch_id`. Does not promise the converse: two launches may share an id, and the agent
must then notice the new one by a rank that attaches again.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath

from everstep.proto.errors import InvalidConfiguration
from everstep.proto.ids import MAX_RANKS
from everstep.proto.places import Places, default_places, format_address, parse_address

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its batch, interactive and external steps from the top of 32 bits down."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process within its launch."""

    rank: int
    """Number of this process, from 0."""
    world: int
    """Number of processes of the job."""
    local_rank: int
    """Number of this process on its host, from 0."""
    launch_id: str
    """Equal on all ranks of one launch, different in the next if the launcher tells them apart;
    empty if nothing is known."""
    restart_count: int
    """How often the launcher of this host has restarted its workers."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The variables in which one launcher says who a process is."""

    rank: str
    world: str
    local_rank: str
    restart_count: str


_TORCHRUN = _Source("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
_SLURM = _Source("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_RESTART_COUNT")


def launch(
    rank: int | None = None,
    world: int | None = None,
    local_rank: int | None = None,
    launch_id: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Launch:
    """Return who this process is: by the arguments, else torchrun, else Slurm, else alone.

    Args:
        rank: Wins over the environment, as do the next three.
        world: See `Launch`.
        local_rank: See `Launch`.
        launch_id: See `Launch`; must be equal on all ranks.
        environ: Instead of the process's own environment.

    Raises:
        InvalidConfiguration: If a number is malformed or out of range; names the variable.
    """
    environ = _own(environ)
    source = _source(environ)
    if source is None:
        found = Launch(rank=0, world=1, local_rank=0, launch_id="", restart_count=0)
    else:
        found = _read(environ, source, named=rank is not None and world is not None)
    chosen = Launch(
        rank=found.rank if rank is None else rank,
        world=found.world if world is None else world,
        local_rank=found.local_rank if local_rank is None else local_rank,
        launch_id=found.launch_id if launch_id is None else launch_id,
        restart_count=found.restart_count,
    )
    return _checked(chosen, source if rank is None and world is None else None)


def places(environ: Mapping[str, str] | None = None) -> Places:
    """Return the default paths of this user's agent; see `default_places`."""
    return default_places(_own(environ), os.getuid())


def named_agent(address: str | None = None, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the address that `address`, or else ``EVERSTEP_AGENT``, names, as gRPC spells it.

    None means that nobody named one: the default is ``places().address``.

    Raises:
        InvalidConfiguration: If it is not of the form ``unix:/path``.
    """
    chosen = address or _own(environ).get("EVERSTEP_AGENT", "")
    return format_address(parse_address(chosen)) if chosen else None


def for_child(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment for a child, with variables set, or unset where None."""
    environ = dict(_own(None))
    for variable, value in changes.items():
        environ.pop(variable, None)
        if value is not None:
            environ[variable] = value
    return environ


def _own(environ: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if environ is None else environ  # noqa: TID251  the place to read it


def _source(environ: Mapping[str, str]) -> _Source | None:
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _TORCHRUN
    if not _is_slurm_task(environ):
        return None
    # The step's own count: SLURM_NTASKS is the job's, and is only set where someone asked for it.
    step_tasks = "SLURM_STEP_NUM_TASKS"
    return replace(_SLURM, world=step_tasks) if step_tasks in environ else _SLURM


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process.

    A plain `python train.py` in a batch script also sees SLURM_PROCID=0 and the SLURM_NTASKS of
    the whole allocation, but is one process: only steps that srun made have a small step id.
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return False
    return _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _read(environ: Mapping[str, str], source: _Source, *, named: bool) -> Launch:
    """Read what `source` says; rank and world may be missing if the caller has `named` them."""
    default = 0 if named else None
    rank = _number(environ, source.rank, default)
    torchrun = source is _TORCHRUN
    return Launch(
        rank=rank,
        world=_number(environ, source.world, default),
        local_rank=_number(environ, source.local_rank, rank),
        launch_id=_torchrun_launch(environ) if torchrun else _slurm_launch(environ),
        restart_count=_number(environ, source.restart_count, 0),
    )


def _torchrun_launch(environ: Mapping[str, str]) -> str:
    """The id of one launch by torchrun, which gives none that serves in all cases.

    Under one torchrun, the directory of TORCHELASTIC_ERROR_FILE is made anew by every torchrun
    and every restart, is the same for all its workers, and reaches them through wrapper scripts,
    which the parent's pid does not. Under several, nothing that is per host may be used: neither
    that directory nor TORCHELASTIC_RESTART_COUNT, which counts only on the host whose worker
    failed. A run id of "none" is the default and means that none was given.
    """
    run_id = environ.get("TORCHELASTIC_RUN_ID", "")
    if not run_id:
        return ""
    named = run_id != "none"
    if _number(environ, "GROUP_WORLD_SIZE", 0) != 1:
        return f"{run_id}:{environ.get('MASTER_PORT', '')}" if named else ""
    restart_count = _number(environ, "TORCHELASTIC_RESTART_COUNT", 0)
    # <log dir>/<run id>_<random>/attempt_<n>/<local rank>/error.json
    error_file = PurePath(environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if len(error_file.parents) > 2 and error_file.parents[1].name == f"attempt_{restart_count}":
        run_directory = os.fsencode(error_file.parents[2])
        unique = blake2b(run_directory, digest_size=8).hexdigest()
        return f"{run_id}.{unique}.{restart_count}"
    return f"{run_id}.{restart_count}" if named else ""


def _slurm_launch(environ: Mapping[str, str]) -> str:
    job, step = environ.get("SLURM_JOB_ID", ""), environ["SLURM_STEP_ID"]
    return f"{job}.{step}.{_number(environ, 'SLURM_RESTART_COUNT', 0)}" if job else ""


def _number(environ: Mapping[str, str], variable: str, default: int | None = None) -> int:
    text = environ.get(variable)
    if text is None:
        if default is None:
            raise InvalidConfiguration(
                variable, "is not set, though the launcher's other variables are; set both or none"
            )
        return default
    # int() alone would also take " 1", "+1" and "1_0".
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise InvalidConfiguration(variable, f"{text!r} is not a whole number", "the environment")
    return int(text)


def _checked(chosen: Launch, source: _Source | None) -> Launch:
    rank_name, world_name = (source.rank, source.world) if source else ("rank", "world")
    if not 1 <= chosen.world <= MAX_RANKS:
        raise InvalidConfiguration(world_name, f"{chosen.world} is not between 1 and {MAX_RANKS}")
    if not 0 <= chosen.rank < chosen.world:
        raise InvalidConfiguration(
            rank_name,
            f"{chosen.rank} is not a rank of a world of {chosen.world}: 0 to {chosen.world - 1}",
        )
    if chosen.local_rank < 0:
        raise InvalidConfiguration("local_rank", f"{chosen.local_rank} is negative")
    return chosen
