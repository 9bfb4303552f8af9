"""What is installed, which back end each part will use and why, and what would fall back."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass

import torch

from fastclip import __version__
from fastclip.data.demo_packages import npm_command
from fastclip.flops import peak_flops
from fastclip.models import attention
from fastclip.nvidia_apex import find_optimizer
from fastclip.ops.dispatch import choose

_PACKAGES = (
    # distribution name, what fastclip uses it for
    ("torch", "everything"),
    ("triton", "fused kernels"),
    ("deepspeed", "training"),
    ("numpy", "data"),
    ("pillow", "image decoding"),
    ("simplejpeg", "JPEG decoding"),
    ("ftfy", "tokenizer"),
    ("regex", "tokenizer"),
    ("safetensors", "weights"),
    ("tensorboard", "event files"),
    ("rich", "progress line"),
    ("matplotlib", "figures"),
    ("scipy", "intervals of evaluations"),
    ("faiss-cpu", "search among more than 100,000 images"),
    ("fastapi", "the web page of a search"),
    ("uvicorn", "the web page of a search"),
    ("pyvips", "drawing the demo's pictures"),
    ("xformers", "attention"),
    ("nvidia-dali-cuda130", "image decoding on the GPU"),
    ("wandb", "logging to Weights & Biases"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `doctor` found."""

    versions: tuple[Finding, ...]
    devices: tuple[Finding, ...]
    parts: tuple[Finding, ...]


def doctor() -> Report:
    """Look at the environment; imports nothing heavy besides torch and needs nothing installed."""
    return Report(versions=_versions(), devices=_devices(), parts=_parts())


def format_report(report: Report) -> str:
    """The report as three tables."""
    blocks = []
    for title, findings in (
        ("versions", report.versions),
        ("devices", report.devices),
        ("parts", report.parts),
    ):
        names = max(len(finding.name) for finding in findings)
        values = max(len(finding.value) for finding in findings)
        lines = [
            f"  {finding.name:{names}s}  {finding.value:{values}s}  {finding.note}".rstrip()
            for finding in findings
        ]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> tuple[Finding, ...]:
    found = [
        Finding("fastclip", __version__),
        Finding("python", platform.python_version(), platform.platform()),
        Finding("cuda", torch.version.cuda or "none", "that torch was built for"),
    ]
    for name, use in _PACKAGES:
        found.append(Finding(name, version_of(name) or "not installed", use))
    return tuple(found)


def _devices() -> tuple[Finding, ...]:
    threads = Finding("cpu", f"{torch.get_num_threads()} threads", platform.machine())
    if not torch.cuda.is_available():
        return (
            threads,
            Finding("cuda", "none", "torch sees no CUDA device: towers run on the CPU"),
        )
    found = [threads]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        peak = peak_flops(torch.device("cuda", number), "bf16")
        known = "peak unknown: MFU is n/a" if peak is None else f"{peak / 1e12:.0f} TFLOP/s bf16"
        memory = properties.total_memory / 2**30
        note = f"sm_{properties.major}{properties.minor}, {memory:.0f} GiB, {known}"
        found.append(Finding(f"cuda:{number}", properties.name, note))
    return tuple(found)


def _parts() -> tuple[Finding, ...]:
    return (
        _one_of_two(
            "losses",
            choose("auto", _like_in_training()) == "triton",
            ("Triton kernels", "exact, memory O(N·D) and a budget; not yet run on a GPU"),
            ("chunked PyTorch", "exact, memory O(N·D); Triton needs an Ampere GPU or newer"),
        ),
        _one_of_two(
            "training engine",
            version_of("deepspeed") is not None,
            ("PyTorch, DeepSpeed", "one rank; several, with ZeRO 0 to 3"),
            ("PyTorch", "one rank; several would stop: pip install 'fastclip-torch[train]'"),
        ),
        _one_of_two(
            "collectives",
            torch.cuda.is_available(),
            ("NCCL", "one rank per CUDA device"),
            ("gloo", "no CUDA device"),
        ),
        Finding("attention", f"torch {_attention()}", "of packed texts, in training's precision"),
        Finding("optimiser", "torch AdamW, fused", _apex_note()),
        _tokenizer(),
        _cuda_tokenizer(),
        _image_decoding(),
        _npm(),
        _one_of_two(
            "multi-node launch",
            shutil.which("pdsh") is not None,
            ("deepspeed with pdsh", "its default runner"),
            ("deepspeed --launcher openmpi, slurm …", "pdsh, the default runner, is missing"),
        ),
    )


def _like_in_training() -> torch.Tensor:
    """Nothing, where features are and in the dtype in which they are multiplied."""
    if torch.cuda.is_available():
        return torch.empty(0, dtype=torch.bfloat16, device="cuda")
    return torch.empty(0)


def _attention() -> str:
    return attention.choose("auto", _like_in_training(), packed=True)


def _one_of_two(
    name: str, first: bool, then: tuple[str, str], otherwise: tuple[str, str]
) -> Finding:
    return Finding(name, *(then if first else otherwise))


def _apex_note() -> str:
    if find_optimizer("FusedAdam") is None:
        return "NVIDIA's apex is not built here; optim.implementation=apex would stop"
    return "NVIDIA's apex is here: optim.implementation=apex"


def _tokenizer() -> Finding:
    try:
        from fastclip.tokenizer import _native
        from fastclip.tokenizer.backends import NativeBackend
    except ImportError:
        return Finding("tokenizer", "python", "exact but slow; the native one was not built")
    made_with = {name: version_of(name) for name in _native.MADE_WITH}
    others = [
        f"{name} {found}, its tables {_native.MADE_WITH[name]}"
        for name, found in made_with.items()
        if found not in (None, _native.MADE_WITH[name])
    ]
    note = f"{NativeBackend('openai').instructions}; exact"
    return Finding("tokenizer", "native", "; ".join([note, *others]))


def _cuda_tokenizer() -> Finding:
    try:
        from fastclip.tokenizer import _cuda
    except ImportError:
        return Finding("CUDA tokenizer", "not built", "there was no nvcc; the host tokenizes")
    devices = _cuda.device_count()
    note = f"{devices} CUDA devices" if devices else "there is no CUDA device"
    return Finding("CUDA tokenizer", "built" if devices else "built, not usable", note)


def _image_decoding() -> Finding:
    dali = version_of("nvidia-dali-cuda130") is not None
    note = "data.decoder=dali is there too" if dali else "data.decoder=dali is not installed"
    try:
        from fastclip.data.decoders import instructions
    except ImportError:
        return Finding("image decoding", "none", "pip install 'fastclip-torch[train]'")
    if not instructions():
        return Finding("image decoding", "Pillow", f"slower than the native one; {note}")
    return Finding("image decoding", f"libjpeg-turbo, our resize ({instructions()})", note)


def _npm() -> Finding:
    try:
        return Finding("demo data", "npm", npm_command()[0])
    except FileNotFoundError as error:
        return Finding("demo data", "none", str(error))
