"""Putting a restored snapshot back into an optimizer.

Owns the way from state that is filed under parameters' names to `load_state_dict`, and the form of
state that the live optimizer does not have yet. Promises that state keeps the dtype that it was
saved with, whatever `load_state_dict` casts; that it is spread over ranks as its parameter is now;
and that groups which hold other parameters than at the snapshot are refused, unless ranks had parts
of them (stages, ZeRO) or parameters were renamed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from everstep.client.attachment import (
    Attachment,
    Names,
    dtype_named,
    grouping,
    parameters_by_index,
)
from everstep.client.loading import Loading, Problems, live_tensors
from everstep.client.resizing import members_of
from everstep.client.saved import Form
from everstep.snapshot.placement import (
    Extent,
    FlatExtent,
    Placed,
    Spread,
    beside,
    is_distributed,
    like,
    local_of,
    plain,
)
from everstep.snapshot.tree import split


def check(
    attached: Attachment, names: Mapping[int, str], loading: Loading, problems: Problems
) -> None:
    """Compare an optimizer with what was saved, and say what will be filled."""
    part, optimizer, saved = attached.part.name, attached.target, loading.saved
    live = live_tensors(attached, names)
    known = dict(parameters_by_index(optimizer, names))
    forms = {}
    for name, form in saved.forms_of(part).items():
        owner = _owner(name)
        if owner is None or owner in known:
            forms[name] = form
        elif problems.expects(name) and not attached.partial:
            problems.unexpected.append(name)
    fitting = {n: t for n, t in live.items() if n in forms and forms[n].fits(t)}
    extents = names.extents if isinstance(names, Names) else {}
    tensors: dict[str, Placed] = {}
    for name, form in forms.items():
        made = fitting.get(name)
        tensors[name] = _made(name, form, known, extents, problems) if made is None else made
    values = _values(attached, loading, known)
    tree = saved.tree(part, {name: plain(tensor) for name, tensor in tensors.items()}, values)
    _check_groups(attached, names, tree, loading, problems)

    def prepare() -> dict[str, Placed]:
        _load(optimizer, tree, names)
        if attached.outer is not None:
            _pass_on(optimizer, attached.outer)
        return _adopted(attached, names, forms, tensors)

    loading.will_fill(tensors, prepare)


def _owner(name: str) -> str | None:
    """The parameter whose state a leaf is; None if it is no parameter's."""
    path = split(name)
    is_state = len(path) > 2 and path[1] == "state" and isinstance(path[2], str)
    return str(path[2]) if is_state else None


def _made(
    name: str,
    form: Form,
    parameters: Mapping[str, torch.Tensor],
    extents: Mapping[str, Sequence[Extent | FlatExtent]],
    problems: Problems,
) -> Placed:
    """Memory for state that the optimizer does not have yet: spread as its parameter is."""
    owner = parameters.get(_owner(name) or "")
    placed = extents.get(_owner(name) or "")
    if owner is not None and placed and form.shape == tuple(placed[0].global_shape):
        extent = [replace(one, tensor=name) for one in placed]
        return Spread(name, form.empty_as(owner), extent)
    if owner is not None and is_distributed(owner):
        # Steps are counted in plain tensors, which a parameter without dimensions looks like.
        if form.shape == tuple(owner.shape) and split(name)[-1] != "step":
            return like(owner, form.empty_as(local_of(owner)))
        if problems.saved.tensor(name).is_sharded:
            made = beside(owner, form.shape, dtype_named(form.dtype))
            if made is not None:
                return made
            problems.reshaped.append(
                f"{name}: {form}, spread over ranks -> not there yet, and not shaped as its "
                "parameter; take one step before restore(), so that it is"
            )
    return form.empty(_device(name, owner))


def _device(name: str, owner: torch.Tensor | None) -> torch.device | None:
    """Where load_state_dict will want a tensor, which would otherwise be copied there unfilled.

    It leaves a step where it is unless the group says otherwise.
    """
    path = split(name)
    of_parameter = path[1] == "state" and len(path) > 3 and path[-1] != "step"
    return owner.device if of_parameter and owner is not None else None


def _values(
    attached: Attachment, loading: Loading, parameters: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """The options of the groups, and the plain state of those parameters that are here: that of
    others may be on any rank."""
    part, saved = attached.part.name, loading.saved
    values = {
        path: json
        for path, json in (loading.resizing.values_of(attached) or saved.values).items()
        if _owner(path) is None or _owner(path) in parameters
    }
    for held in saved.values_of(part).values():
        values |= {
            path: json
            for path, json in held.items()
            if path not in values and _owner(path) in parameters
        }
    return values


def _check_groups(
    attached: Attachment,
    names: Mapping[int, str],
    tree: dict[str, Any],
    loading: Loading,
    problems: Problems,
) -> None:
    """Groups hold the parameters that they held, as far as one rank can know."""
    part, saved = attached.part.name, loading.saved
    present = grouping(attached.target, names)
    then = [group.get("params") for group in tree["param_groups"]]
    if then == present:
        return
    by_rank = {members_of(values, part) for values in saved.values_of(part).values()}
    parts_differ = len(by_rank) > 1 or problems.terms.partial or attached.partial
    renamed = bool(problems.terms.rename)
    if (parts_differ or renamed) and len(then) == len(present):
        return
    problems.reshaped.append(
        f"{part}/param_groups: its groups hold other parameters than at the snapshot"
    )


def _load(optimizer: torch.optim.Optimizer, tree: dict[str, Any], names: Mapping[int, str]) -> None:
    """Hand the saved tree to the optimizer in its own form, with indices."""
    index_of = {name: i for i, (name, _) in enumerate(parameters_by_index(optimizer, names))}
    present = optimizer.state_dict()
    state = dict(tree)
    state["state"] = {index_of.get(key, key): value for key, value in tree.get("state", {}).items()}
    state["param_groups"] = [
        {**group, "params": now["params"]}
        for group, now in zip(tree["param_groups"], present["param_groups"], strict=True)
    ]
    optimizer.load_state_dict(state)


def _pass_on(inner: torch.optim.Optimizer, outer: torch.optim.Optimizer) -> None:
    """ZeroRedundancyOptimizer writes its own options over the inner ones at its next step."""
    for group, own in zip(inner.param_groups, outer.param_groups, strict=True):
        own.update({key: value for key, value in group.items() if key != "params"})


def _adopted(
    attached: Attachment,
    names: Mapping[int, str],
    forms: Mapping[str, Form],
    made: Mapping[str, Placed],
) -> dict[str, Placed]:
    """The optimizer's tensors after load_state_dict, with the dtypes that were saved.

    torch casts floating state to the parameter's dtype (fp32 moments of bf16 weights would lose
    half their bits), so such tensors are replaced where they are kept.
    """
    live = live_tensors(attached, names)
    by_name = dict(parameters_by_index(attached.target, names))
    for name, tensor in live.items():
        form = forms.get(name)
        if form is None or form.fits(tensor):
            continue
        _, _, owner, *path = split(name)
        holder: Any = attached.target.state[by_name[str(owner)]]
        for element in path[:-1]:
            holder = holder[element]
        own, device = made[name], local_of(tensor).device
        live[name] = own if local_of(own).device == device else form.empty(device)
        holder[path[-1]] = plain(live[name])
    return {name: tensor for name, tensor in live.items() if name in forms}
