"""Update rules, one file each: what users construct, and the arithmetic that kernels follow."""

from everstep.client.optim.methods.adamw import Adam, AdamW
from everstep.client.optim.optimizer import Optimizer
from everstep.proto.errors import InvalidConfiguration

__all__ = ["METHODS", "method_named"]

METHODS: dict[str, type[Optimizer]] = {method.__name__: method for method in (AdamW, Adam)}
"""Every optimizer by its name."""


def method_named(name: str) -> type[Optimizer]:
    """The optimizer of that name.

    Raises:
        InvalidConfiguration: If there is none.
    """
    try:
        return METHODS[name]
    except (KeyError, TypeError):
        problem = f"{name!r} is not one of {', '.join(METHODS)}"
        raise InvalidConfiguration("method", problem) from None
