"""Another optimizer as an engine: stepped on parts of its parameters, without its hooks.

Owns what is refused, the trial on stand-ins and the bare step. Promises that a trial changes no
parameters, no state, no groups and nothing that the optimizer counts.
"""

import logging
from typing import Any

import torch

from everstep.proto.errors import NotCompressible

log = logging.getLogger("everstep")


def state_made_for(
    engine: torch.optim.Optimizer, group: dict[str, Any], stand_in: torch.nn.Parameter
) -> dict[str, Any]:
    """The state of one step of a stand-in; nothing else changes."""
    groups, numbers = engine.param_groups, numbers_of(engine)
    tensors = [(v, v.clone()) for v in group.values() if isinstance(v, torch.Tensor)]
    others = set(engine.state)
    stand_in.grad = torch.full_like(stand_in, 0.01)
    engine.param_groups = [{**group, "params": [stand_in]}]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            own_step(engine)
    except Exception as problem:
        log.debug("%s does not step on a stand-in: %s", type(engine).__name__, problem)
    finally:
        engine.param_groups = groups
        vars(engine).update(numbers)
        for tensor, value in tensors:
            tensor.copy_(value)
    state = dict(engine.state.pop(stand_in, {}))
    strays = [key for key in engine.state if key not in others and not torch.is_tensor(key)]
    for key in strays:
        del engine.state[key]
    if strays:
        what = f"its state {strays[0]!r} belongs to no parameter"
        raise NotCompressible(type(engine).__name__, what)
    return state


def check(engine: torch.optim.Optimizer) -> None:
    """Refuse what cannot be an engine, before it is tried.

    Raises:
        NotCompressible: With the reason.
    """
    problem = None
    if isinstance(engine, torch.optim.LBFGS):
        problem = "its state is lists of past steps, of all parameters in one"
    elif any(group.get("differentiable") for group in engine.param_groups):
        problem = "differentiable=True needs the state of the step in the graph"
    elif engine._optimizer_step_pre_hooks or engine._optimizer_step_post_hooks:
        problem = "it has step hooks, which would run for each part; register them on the result"
    elif hasattr(engine.step, "_wrapped_by_lr_sched"):
        problem = "an LR scheduler holds it; make the scheduler for the result"
    elif any("codec" in g for g in engine.param_groups) and not _torchs(engine):
        problem = "it holds codes already"
    if problem is not None:
        raise NotCompressible(type(engine).__name__, problem)


def _torchs(engine: torch.optim.Optimizer) -> bool:
    return not type(engine).__module__.startswith(__name__.rpartition(".")[0])


def numbers_of(engine: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer counts outside of its groups."""
    return {k: v for k, v in vars(engine).items() if isinstance(v, (bool, int, float))}


def own_step(engine: torch.optim.Optimizer) -> None:
    """The step without hooks: those of the whole step run once, around it."""
    step: Any = type(engine).step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    step(engine)
