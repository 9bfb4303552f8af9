"""The CUDA tokenizer without a GPU: its warps' program, compiled for the host, behind its face."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import unicodedata
from pathlib import Path

from fastclip.tokenizer.vocabulary import MERGES_PATH

ROOT = Path(__file__).parents[1]
SOURCES = (
    *(ROOT / "csrc" / f"{name}.cpp" for name in ("unicode", "vocabulary")),
    ROOT / "tests/tokenizer/warp_emulation.cpp",
)


def compile_emulation(folder: Path) -> ctypes.CDLL | None:
    """The program as a library; None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    library = folder / "warp_emulation.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", "-o", str(library), *map(str, SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.emulation_new.restype = ctypes.c_void_p
    return loaded


class EmulatedEncoder:
    """What fastclip.tokenizer._cuda.Encoder is, over the host's memory."""

    def __init__(self, library: ctypes.CDLL, strict: bool = False) -> None:
        merges = MERGES_PATH.read_bytes()
        version = int(unicodedata.unidata_version.split(".")[0])
        self._library = library
        self._emulation = ctypes.c_void_p(
            library.emulation_new(merges, ctypes.c_size_t(len(merges)), version, int(strict))
        )
        assert self._emulation.value is not None

    def __del__(self) -> None:
        self._library.emulation_delete(self._emulation)

    def encode(
        self,
        data: int,
        size: int,
        offsets: int,
        count: int,
        rows: int,
        context_length: int,
        id_bytes: int,
        lengths: int,
        refused: int,
        truncate: bool,
        stream: int,
    ) -> None:
        """As `_cuda.Encoder.encode`; there is no stream."""
        del stream
        self._library.emulation_encode(
            self._emulation,
            ctypes.c_void_p(data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(offsets),
            ctypes.c_size_t(count),
            ctypes.c_void_p(rows),
            ctypes.c_size_t(context_length),
            id_bytes,
            ctypes.c_void_p(lengths),
            ctypes.c_void_p(refused),
            int(truncate),
        )
