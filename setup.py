"""Native modules only; everything else about the package is in pyproject.toml.

FASTCLIP_NATIVE says what becomes of the C++ modules: "auto" (the default) leaves them out with a
warning where they cannot be compiled, "1" makes that an error, "0" does not try. FASTCLIP_CUDA says
the same of the CUDA tokenizer, which "auto" tries only where there is an nvcc; FASTCLIP_CUDA_ARCHS
lists the architectures to compile it for ("80,90,100").

This file must never import torch: a build environment has none.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup
from setuptools.errors import CompileError

SOURCES = {
    "fastclip.tokenizer._native": (
        "unicode",
        "entities",
        "clean",
        "vocabulary",
        "bpe",
        "ascii",
        "encoder",
        "batch",
        "bindings",
    ),
    "fastclip.data._native": (
        "members_bindings",
        "resample",
        "resample_x86",
        "resample_bindings",
        "phrases",
        "phrases_bindings",
        "data_bindings",
    ),
}
CUDA_SOURCES = ("unicode", "vocabulary", "cuda_bindings")
CUDA_KERNELS = "csrc/bpe_cuda.cu"
CUDA_ARCHS = "80,90,100"
HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*.[hi]*"))]


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is 'auto', '0' or '1', not {value!r}")
    return value


def native_modules() -> list[Pybind11Extension]:
    wanted = setting("FASTCLIP_NATIVE")
    if wanted == "0":
        return []
    modules = []
    for module, sources in SOURCES.items():
        extension = Pybind11Extension(
            module,
            [f"csrc/{name}.cpp" for name in sources],
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
        )
        extension.optional = wanted == "auto"
        modules.append(extension)
    return modules


def cuda_tokenizer() -> list[Pybind11Extension]:
    wanted = setting("FASTCLIP_CUDA")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("FASTCLIP_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
        return []
    extension = Pybind11Extension(
        "fastclip.tokenizer._cuda",
        [f"csrc/{name}.cpp" for name in CUDA_SOURCES],
        depends=[*HEADERS, CUDA_KERNELS],
        cxx_std=17,
        extra_compile_args=["-O3"],
        libraries=["cudart_static", "rt", "dl", "pthread"],
    )
    extension.optional = wanted == "auto"
    extension.nvcc = nvcc
    return [extension]


def find_nvcc() -> str | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = Path(home, "bin", "nvcc")
            if nvcc.is_file():
                return str(nvcc)
    return shutil.which("nvcc")


class build_ext(pybind11_build_ext):  # noqa: N801 (the name that setuptools knows)
    """Adds what nvcc compiles to an extension that names one."""

    def run(self) -> None:
        for name in (*SOURCES, "fastclip.tokenizer._cuda"):
            # What an earlier build has left, and this one may not make again.
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext) -> None:
        if nvcc := getattr(ext, "nvcc", None):
            compiled = Path(self.build_temp, "bpe_cuda.o")
            compiled.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            self.call([nvcc, *flags, *targets(nvcc), "-c", CUDA_KERNELS, "-o", str(compiled)])
            ext.extra_objects.append(str(compiled))
            ext.library_dirs += libraries(nvcc)
        super().build_extension(ext)

    def call(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"{command[0]} cannot compile {CUDA_KERNELS}")


def ask(nvcc: str, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run([nvcc, *options], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{nvcc} cannot be run: {error}") from error
    if done.returncode:
        raise CompileError(f"{nvcc} {options[0]} failed ({done.returncode}): {done.stderr.strip()}")
    return done


def targets(nvcc: str) -> list[str]:
    """Machine code for each architecture that this nvcc knows, and PTX for later ones."""
    known = ask(nvcc, "--list-gpu-code").stdout.split()
    asked = os.environ.get("FASTCLIP_CUDA_ARCHS", CUDA_ARCHS).split(",")
    names = [arch.strip() for arch in asked]
    archs = [arch for arch in names if f"sm_{arch}" in known]
    for arch in names:
        if arch not in archs:
            print(f"warning: {nvcc} does not know sm_{arch}: the CUDA tokenizer is without it")
    if not archs:
        raise CompileError(f"{nvcc} knows none of FASTCLIP_CUDA_ARCHS: {' '.join(known)}")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def libraries(nvcc: str) -> list[str]:
    """Where the toolkit's libraries lie: asked of nvcc, which may be a wrapper somewhere else."""
    said = ask(nvcc, "-dryrun", "-x", "cu", os.devnull).stderr
    line = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    return [str(Path(folder).resolve()) for folder in re.findall(r'"-L([^"]+)"', line)]


ParallelCompile("FASTCLIP_BUILD_JOBS", default=0).install()
setup(ext_modules=[*native_modules(), *cuda_tokenizer()], cmdclass={"build_ext": build_ext})
