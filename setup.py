"""Native modules only; everything else about the package is in pyproject.toml.

FASTCLIP_NATIVE says what becomes of the C++ tokenizer: "auto" (the default) leaves it out with a
warning where it cannot be compiled, "1" makes that an error, "0" does not try.

This file must never import torch: a build environment has none.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = (
    "unicode",
    "entities",
    "clean",
    "vocabulary",
    "bpe",
    "ascii",
    "encoder",
    "batch",
    "bindings",
)


def native_tokenizer(wanted: str) -> list[Pybind11Extension]:
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTCLIP_NATIVE is 'auto', '0' or '1', not {wanted!r}")
    if wanted == "0":
        return []
    extension = Pybind11Extension(
        "fastclip.tokenizer._native",
        [f"csrc/{name}.cpp" for name in SOURCES],
        depends=[str(path) for path in sorted(Path("csrc").rglob("*.[hi]*"))],
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread"],
        extra_link_args=["-pthread"],
    )
    extension.optional = wanted == "auto"
    return [extension]


ParallelCompile("FASTCLIP_BUILD_JOBS", default=0).install()
setup(
    ext_modules=native_tokenizer(os.environ.get("FASTCLIP_NATIVE", "auto")),
    cmdclass={"build_ext": build_ext},
)
