"""fastclip: a performance-focused trainer for CLIP (arXiv 2103.00020).

Importing the package loads nothing heavy; every part is imported by its own name, for example
``from fastclip.losses import ClipLoss``, which needs torch and nothing else.
"""

__version__ = "0.1.0"
