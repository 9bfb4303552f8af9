"""Native modules only; everything else about the package is in pyproject.toml.

There is none yet. This file must never import torch: a build environment has none.
"""

from setuptools import setup

setup()
