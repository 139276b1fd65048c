"""State of other libraries' optimizers, into these and back: bitsandbytes, torchao, torch itself.

Promises that codes are taken over as they are where the format is the same (`dynamic` for the 8-bit
ones, `4bit` for torchao's), that all else is decoded and encoded anew, and that the `Account` says
which, and why. State of another method, or of other shapes, is refused.
"""

from everstep.client.optim.interchange.account import Account, Conversion
from everstep.client.optim.interchange.exporting import export_state_dict
from everstep.client.optim.interchange.importing import import_state_dict

__all__ = ["Account", "Conversion", "export_state_dict", "import_state_dict"]
