"""Speed, measured beside its reference: ``python -m benchmarks.NAME``.

Each module prints a readable table and, last, one JSON line. Every ratio is taken in one run,
medians of several rounds in which the candidates take turns, so that a busy neighbour hits all.
"""

import sys
from pathlib import Path

# `python -m` puts the checkout's root first, where the folder `everstep` hides the package.
_ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [entry for entry in sys.path if entry not in ("", _ROOT)]
