"""Features: order, labels, both kinds of one pass, ranks, files."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluating import evaluator
from fastclip.data.eval_loader import EvalBatch, eval_batches
from fastclip.data.index import Sample, ShardIndex, index_shards
from fastclip.distributed.runtime import Runtime
from fastclip.eval.features import Features, extract_features, load_features, save_features
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig
from fastclip.models.presets import preset
from ranks import run_ranks
from resharding import encoded
from shards import COLOURS, picture, write_shards, write_tar

ALONE = Runtime.alone(torch.device("cpu"))


def _config() -> ClipConfig:
    config = preset("ViT-Nano-8")
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=1),
        text=dataclasses.replace(config.text, layers=1),
    )


def _model(config: ClipConfig) -> Clip:
    torch.manual_seed(3)
    return Clip(config).eval()


def _not_black(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    colours = [about["label"].split()[0] for about in batch.metadata]
    kept = torch.tensor([colour != "black" for colour in colours])
    return torch.tensor([COLOURS.index(c) for c in colours if c != "black"]), kept


def _colour_and_shape(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    labels = torch.zeros(len(batch), 28, dtype=torch.bool)
    for row, about in enumerate(batch.metadata):
        labels[row, about["label_id"]] = labels[row, 24 + about["label_id"] // 6] = True
    return labels, torch.ones(len(batch), dtype=torch.bool)


def _none(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(len(batch), dtype=torch.bool)


def _too_many(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(batch), dtype=torch.int64), torch.zeros(len(batch), dtype=torch.bool)


def _broken_second(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    if 7 in batch.numbers:
        raise ValueError(f"sample {batch.keys[0]} has no label")
    return _not_black(batch)


def _all_one(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    return torch.ones(len(batch), dtype=torch.int64), torch.ones(len(batch), dtype=torch.bool)


LABELS = {f.__name__: f for f in (_not_black, _colour_and_shape, _none, _too_many, _broken_second)}


def _extract(
    runtime: Runtime, folder: Path, labels: str = "_not_black", model: Clip | None = None
) -> Features:
    return extract_features(
        evaluator(_model(_config()) if model is None else model, runtime, workers=2),
        index_shards(str(folder / "shards"), needs=("json",)),
        LABELS[labels],
    )


def _assert_same(a: Features, b: Features) -> None:
    assert a.keys == b.keys
    assert a.labels.dtype == b.labels.dtype
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.embedding, b.embedding)
    torch.testing.assert_close(a.representation, b.representation)


def test_equals_the_model_image_by_image(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs=23, per_shard=9)
    model = _model(_config()).train()
    found = _extract(ALONE, tmp_path, model=model)
    assert model.training
    model.eval()
    keys, places = [], []
    for batch in eval_batches(
        index_shards(str(tmp_path / "shards")),
        image_size=64,
        batch_size=1,
    ):
        colour = batch.metadata[0]["label"].split()[0]
        if colour == "black":
            continue
        row = len(keys)
        with torch.no_grad():
            feature = model(images=batch.images).image_features[0]
        torch.testing.assert_close(found.embedding[row], feature)
        keys.extend(batch.keys)
        places.append(COLOURS.index(colour))
    assert found.keys == tuple(keys)
    assert found.labels.tolist() == places
    assert found.representation.shape == (len(keys), model.config.vision.width)
    with torch.no_grad():
        projected = model.visual.proj(found.representation)
    torch.testing.assert_close(F.normalize(projected, dim=1), found.embedding)


def _extract_all(runtime: Runtime, folder: Path) -> tuple[list[Features], str]:
    found = [
        _extract(runtime, folder / "many"),
        _extract(runtime, folder / "many", "_colour_and_shape"),
        _extract(runtime, folder / "few"),
    ]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        _extract(runtime, folder / "many", "_broken_second")
    return found, str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(tmp_path: Path, world_size: int) -> None:
    # Five batches, the last of three samples; and one batch, so that other ranks have no sample.
    write_shards(tmp_path / "many", pairs=23, per_shard=9)
    write_shards(tmp_path / "few", pairs=4)
    alone, problem = _extract_all(ALONE, tmp_path)
    assert [len(one) for one in alone] == [20, 23, 4]
    assert problem == "sample 000005 has no label"
    for found, told in run_ranks(_extract_all, world_size, tmp_path, tmp_path):
        assert told == problem  # by a label of one rank alone
        for one, expected in zip(found, alone, strict=True):
            _assert_same(one, expected)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs=6)
    with pytest.raises(ValueError, match="no image of the data set could be read and has a label"):
        _extract(ALONE, tmp_path, "_none")
    with pytest.raises(ValueError, match=r"a bool mask of all 5 rows, not \[5\]"):
        _extract(ALONE, tmp_path, "_too_many")


class _Reversed:
    """Any samples by number."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int, /) -> Sample:
        return self._index[len(self._index) - 1 - number]


def test_any_source_of_samples(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs=7)
    found = extract_features(
        evaluator(_model(_config()), ALONE),
        _Reversed(index_shards(str(tmp_path / "shards"))),
        _not_black,
    )
    assert found.keys == ("000006", "000004", "000003", "000002", "000001", "000000")
    _assert_same(found, _extract(ALONE, tmp_path).rows(torch.arange(5, -1, -1)))


def test_images_are_turned_upright_where_the_run_turned_them(tmp_path: Path) -> None:
    upright = Image.open(io.BytesIO(picture("red", "triangle", 7)))
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", orientation=6)
    found = []
    for name, content, orient in (
        ("upright", encoded(upright, "PNG"), False),
        ("turned", turned, True),
        ("turned", turned, False),
    ):
        write_tar(tmp_path / f"{name}.tar", [("0", {"png": content, "json": b"{}"})])
        source = index_shards(str(tmp_path / f"{name}.tar"), needs=("json",))
        upright_or_not = evaluator(_model(_config()), ALONE, apply_orientation=orient)
        found.append(extract_features(upright_or_not, source, _all_one).embedding)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("tower", ["ViT", "ResNet"])
def test_what_is_before_the_projection(tower: str, projection: str) -> None:
    config = dataclasses.replace(_config(), projection=projection)
    if tower == "ResNet":
        vision = ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=4, heads=2)
        config = dataclasses.replace(config, vision=vision)
    model = _model(config)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(output if tower == "ResNet" else inputs[0])

    layer = model.visual.attnpool if tower == "ResNet" else model.visual.proj
    handle = layer.register_forward_hook(see)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with torch.no_grad():
        expected = model(images, normalize=False).image_features
        handle.remove()
        embedding, representation = model.represent(images)
    assert torch.equal(representation, seen[0])
    assert torch.equal(embedding, F.normalize(expected, dim=1))
    if (tower, projection) == ("ResNet", "linear"):  # the paper's: the features themselves
        assert torch.equal(representation, expected)


def _features(keys: tuple[str, ...], labels: Tensor) -> Features:
    count = len(keys)
    return Features(torch.randn(count, 3), torch.randn(count, 4), labels, keys)


@pytest.mark.parametrize("labels", [torch.tensor([2, 0]), torch.tensor([[True], [False]])])
def test_files(tmp_path: Path, labels: Tensor) -> None:
    path = tmp_path / "f.safetensors"
    features = _features(('a "key"', "b\udcff/ü"), labels)
    save_features(features, path)
    loaded = load_features(path)
    assert torch.equal(loaded.embedding, features.embedding)
    assert torch.equal(loaded.representation, features.representation)
    assert torch.equal(loaded.labels, labels)
    assert loaded.keys == features.keys
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_features(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be loaded as features"):
        load_features(path)
    save_file({"labels": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="it holds no features"):
        load_features(path)
    features = _features(("a", "b"), torch.tensor([2, 0]))
    save_features(features, path)
    tensors = {name: getattr(features, name) for name in ("embedding", "representation", "labels")}
    for keys, message in (
        ('["a"]', "embedding of 1 images is fp32"),
        ("[1, 2]", "no list of texts"),
        ("{", "cannot be loaded"),
    ):
        save_file(tensors, path, {"format": "fastclip features 1", "keys": keys})
        with pytest.raises(ValueError, match=message):
            load_features(path)


def test_rows_are_put_together_again() -> None:
    features = _features(("a", "b", "c"), torch.tensor([2, 0, 1]))
    parts = features.rows(torch.tensor([0])).followed_by(features.rows(torch.tensor([1, 2])))
    _assert_same(parts, features)
    with pytest.raises(ValueError, match="labels of 3 images are int64"):
        _features(("a", "b", "c"), torch.zeros(3))
