"""Ways through shards, ours and others': reading alone, and whole training batches."""

from __future__ import annotations

import importlib
import io
import tarfile
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.image_peers import SIZE
from fastclip.data.config import DataConfig
from fastclip.data.index import index_shards
from fastclip.data.loader import TrainLoader
from fastclip.data.plan import Plan
from fastclip.data.reader import Members
from fastclip.tokenizer import Tokenizer

GPU_BATCH = 512

_CPU = torch.device("cpu")

Samples = Callable[[Path], Generator[int, None, None]]
"""From a folder of shards to the numbers of samples that come one after another."""


@dataclass(frozen=True)
class LoaderPeer:
    """One way."""

    name: str
    distribution: str
    samples: Samples
    note: str = ""


def _read_ours(shards: Path) -> Generator[int, None, None]:
    """All members of every sample, in training's order."""
    index = index_shards(str(shards))
    plan = Plan(index.sizes, seed=0)
    for position in range(len(index)):
        _, number = plan(position)
        members = Members(index[number])
        assert len(members.image) > 0
        yield 1


def _read_webdataset(shards: Path) -> Generator[int, None, None]:
    webdataset: Any = importlib.import_module("webdataset")
    for shard in sorted(shards.glob("*.tar")):
        for _ in webdataset.WebDataset(str(shard), shardshuffle=False):
            yield 1


def _read_tarfile(shards: Path) -> Generator[int, None, None]:
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    file.read()
                    yield int(member.name.endswith(".txt"))


def _read_dali(shards: Path) -> Generator[int, None, None]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    functions: Any = fn
    kinds: Any = types
    pipeline: Any = Pipeline(batch_size=64, num_threads=1, device_id=None)
    with pipeline:
        members = functions.readers.webdataset(
            paths=paths,
            index_paths=[path.removesuffix(".tar") + ".idx" for path in paths],
            ext=["jpg", "txt"],
            dtypes=[kinds.UINT8, kinds.UINT8],
            dont_use_mmap=True,
            name="reader",
        )
        pipeline.set_outputs(*members)
    pipeline.build()
    left = pipeline.reader_meta("reader")["epoch_size"]
    while left > 0:
        pipeline.run()
        yield min(64, left)
        left -= 64


READERS: Sequence[LoaderPeer] = (
    LoaderPeer("fastclip", "fastclip-torch", _read_ours, "random order"),
    LoaderPeer("webdataset", "webdataset", _read_webdataset, "sequential"),
    LoaderPeer("tarfile", "", _read_tarfile, "sequential"),
    LoaderPeer("dali", "nvidia-dali-cuda130", _read_dali, "sequential, without mmap"),
)


def ours(
    shards: Path,
    workers: int,
    batch_size: int = 64,
    decoder: Any = "auto",
    device: torch.device = _CPU,
) -> TrainLoader:
    """Our loader over a folder; `device` is where the images are wanted."""
    return TrainLoader(
        DataConfig(train=str(shards), workers=workers, crop_scale=(0.9, 1.0), decoder=decoder),
        image_size=SIZE,
        tokenizer=Tokenizer(),
        batch_size=batch_size,
        rank=0,
        world_size=1,
        seed=0,
        device=device,
    )


def _load_ours(workers: int, decoder: str = "auto") -> Samples:
    def samples(shards: Path) -> Generator[int, None, None]:
        with ours(shards, workers, decoder=decoder) as loader:
            for batch in loader:
                yield len(batch)

    return samples


def _onto_gpu(workers: int, decoder: str, device: torch.device) -> Samples:
    def samples(shards: Path) -> Generator[int, None, None]:
        with ours(shards, workers, GPU_BATCH, decoder, device) as loader:
            for batch in loader:
                yield len(batch.to(device, non_blocking=True))

    return samples


def _load_open_clip(
    workers: int, batch_size: int = 64, device: torch.device = _CPU, passes: int = 1
) -> Samples:
    """open_clip's pipeline: webdataset, Pillow, its transform, its tokenizer.

    Args:
        passes: over the shards until its processes are started anew.
    """

    def samples(shards: Path) -> Generator[int, None, None]:
        from benchmarks.torchvision_beside_cpu import declare_operators

        declare_operators()
        import open_clip
        from open_clip.transform import image_transform

        webdataset: Any = importlib.import_module("webdataset")
        transform: Any = image_transform(SIZE, is_train=True)
        tokenizer = open_clip.get_tokenizer("ViT-B-32")

        def pair(sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
            image = Image.open(io.BytesIO(sample["jpg"]))
            return transform(image), tokenizer(sample["txt"].decode())[0]

        paths = [str(path) for path in sorted(shards.glob("*.tar"))] * passes
        while True:
            data = webdataset.WebDataset(paths, shardshuffle=100)
            data = data.shuffle(500).map(pair).batched(batch_size, partial=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loader = torch.utils.data.DataLoader(
                    data, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"
                )
                for images, _ in loader:
                    yield len(images.to(device, non_blocking=True))

    return samples


def loaders(workers: int) -> Sequence[LoaderPeer]:
    """Whole loaders with as many workers: threads of ours, processes of theirs."""
    return (
        LoaderPeer("fastclip", "fastclip-torch", _load_ours(workers)),
        LoaderPeer("fastclip-pillow", "pillow", _load_ours(workers, "pillow")),
        LoaderPeer("open_clip", "open_clip_torch", _load_open_clip(workers), "webdataset"),
    )


def loaders_onto(device: torch.device, cores: int) -> Sequence[LoaderPeer]:
    """Whole loaders that bring batches of `GPU_BATCH` to a GPU, on all cores of its host."""
    few = max(1, cores // 4)  # DALI decodes on the GPU; its own threads prepare
    processes = max(1, cores - 2)
    return (
        LoaderPeer("fastclip", "fastclip-torch", _onto_gpu(cores, "auto", device)),
        LoaderPeer("fastclip-dali", "nvidia-dali-cuda130", _onto_gpu(few, "dali", device)),
        LoaderPeer(
            "open_clip",
            "open_clip_torch",
            _load_open_clip(processes, GPU_BATCH, device, passes=1000),
            f"webdataset, {processes} processes",
        ),
    )
