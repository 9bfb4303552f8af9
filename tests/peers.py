"""Let transformers import from the checkout's root.

It probes for another project's package called `kernels`, and there finds our folder of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PATH = sys.path[:]
sys.path[:] = [entry for entry in _PATH if Path(entry).resolve() != _ROOT]
try:
    from transformers import CLIPModel as CLIPModel  # remembers that there are no such kernels
finally:
    sys.path[:] = _PATH
