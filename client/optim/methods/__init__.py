"""Update rules, one file each: what users construct, and the arithmetic that kernels follow."""

from everstep.client.optim.methods.adamp import AdamP
from everstep.client.optim.methods.adamw import Adam, AdamW
from everstep.client.optim.methods.ademamix import AdEMAMix
from everstep.client.optim.methods.exadam import EXAdam
from everstep.client.optim.methods.lion import Lion
from everstep.client.optim.methods.muon import Muon
from everstep.client.optim.methods.sgd import SGD
from everstep.client.optim.methods.sgdsai import SGDSaI
from everstep.client.optim.methods.sophia import Sophia
from everstep.client.optim.methods.spam import SPAM
from everstep.client.optim.optimizer import Optimizer
from everstep.proto.errors import InvalidConfiguration

__all__ = ["METHODS", "method_named"]

METHODS: dict[str, type[Optimizer]] = {
    method.__name__: method
    for method in (AdamW, Adam, Lion, SGD, AdEMAMix, EXAdam, AdamP, SGDSaI, Sophia, Muon, SPAM)
}
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
