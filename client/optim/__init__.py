"""Optimizers whose state is held in codes.

    from everstep import optim

    optimizer = optim.AdamW(model.parameters(), lr=3e-4, codec="int8")

Public as `everstep.optim`; see docs/optimizers.md.
"""

from everstep.client.optim.codecs import CODECS, Codec, codec_named, left_plain, register
from everstep.client.optim.compress import compress
from everstep.client.optim.interchange import export_state_dict, import_state_dict
from everstep.client.optim.methods import METHODS, method_named
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
from everstep.client.optim.plan import Plan, plan

__all__ = [
    "CODECS",
    "METHODS",
    "SGD",
    "SPAM",
    "AdEMAMix",
    "Adam",
    "AdamP",
    "AdamW",
    "Codec",
    "EXAdam",
    "Lion",
    "Muon",
    "Optimizer",
    "Plan",
    "SGDSaI",
    "Sophia",
    "codec_named",
    "compress",
    "export_state_dict",
    "import_state_dict",
    "left_plain",
    "method_named",
    "plan",
    "register",
]
