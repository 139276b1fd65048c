"""An optimizer's state under torch's own indices again, where their order can be proven.

Owns the proof: a group says how many parameters it has, and a digest of their names in order (see
`client.attachment.grouping`). Promises that no order is ever guessed.
"""

import hashlib
from collections.abc import Sequence
from typing import Any


def indexed(tree: dict[str, Any], order: list[str]) -> tuple[dict[str, Any], bool]:
    """An optimizer's tree with torch's indices, and whether they could be proven.

    Two orders are tried: that of the state, which is the order of the groups unless some parameter
    has never had a gradient, and that of the modules' tensors.

    Args:
        tree: With names in place of indices.
        order: The names of the modules' tensors, in order.
    """
    groups, state = tree["param_groups"], tree["state"]
    counts = [int(str(group["params"]).partition(":")[0]) for group in groups]
    known = set(state)
    candidates = ([*state], [name for name in order if name in known], order)
    for names in candidates:
        if len(names) != sum(counts) or not known <= set(names):
            continue
        begins = [sum(counts[:index]) for index in range(len(counts))]
        slices = [names[at : at + n] for at, n in zip(begins, counts, strict=True)]
        if all(_digest(s) == group["params"] for s, group in zip(slices, groups, strict=True)):
            index_of = {name: index for index, name in enumerate(names)}
            return {
                **tree,
                "state": {index_of[name]: entry for name, entry in state.items()},
                "param_groups": [
                    {**group, "params": [index_of[name] for name in members]}
                    for group, members in zip(groups, slices, strict=True)
                ],
            }, True
    return tree, False


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    return f"{len(names)}:{digest}"
