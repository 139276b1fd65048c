"""Settings of all tests; fixtures belong beside the tests that use them."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# `python -m pytest` and `python -c` look for modules in the checkout first, where everstep/ is the
# face alone and its other folders are not inside. Children of the tests inherit both settings.
CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != CHECKOUT]
os.environ["PYTHONSAFEPATH"] = "1"
if "PYTHONPATH" in os.environ:
    folders = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))

# The machines that run the tests are shared: how long one example takes says nothing.
settings.register_profile("everstep", deadline=None)
settings.load_profile("everstep")
