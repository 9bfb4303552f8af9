"""Compile a Triton kernel for a GPU that is not here, and read what it will need there."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may use."""

_MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


@dataclass(frozen=True)
class Needs:
    """Resources of a compiled kernel."""

    registers: int
    spilled: int
    """Bytes of registers that a thread stores to and loads from local memory."""

    shared: int
    matrix_instructions: int


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: Any
) -> Needs:
    """Compile `kernel` for sm_`capability` as a launch with aligned pointers and sizes would.

    Args:
        types: Triton's type of each argument that is no constant ("*bf16", "i32", "fp32").
        constants: values of the constexpr arguments.
        options: num_warps, num_stages.
    """
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in ("row_stride", "column_stride", "dims")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Needs(
        registers,
        _spilled(compiled.asm["ptx"], capability, options) if stack else 0,
        compiled.metadata.shared,
        len(_MATRIX_INSTRUCTION.findall(compiled.asm["ptx"])),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        printed = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def _spilled(ptx: str, capability: int, options: dict[str, Any]) -> int:
    """What the assembler says of spills: a stack alone can have other reasons."""
    knobs = triton.knobs.nvidia  # pyright: ignore[reportAttributeAccessIssue]
    tool = knobs.ptxas_blackwell if capability >= 100 else knobs.ptxas
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        fusion = [] if options.get("enable_fp_fusion", True) else ["--fmad=false"]
        printed = subprocess.run(
            [tool.path, "-v", *fusion, f"--gpu-name={target[1]}", source, "-o", f"{source}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", printed)
    assert len(counts) == 2, printed
    return sum(map(int, counts))
