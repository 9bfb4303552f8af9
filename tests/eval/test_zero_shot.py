"""Zero-shot classification against a plain one-process computation, and its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evaluating import evaluator
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from fastclip.distributed.runtime import Runtime
from fastclip.eval.prompts import fill, imagenet_templates
from fastclip.eval.zero_shot import (
    ZeroShotTask,
    build_classifier,
    load_classes,
    rank_of_target,
    zero_shot,
)
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.tokenizer import Tokenizer
from ranks import run_ranks
from shards import sample, write_shards, write_tar

TEMPLATES = ("{}", "a drawing of a {}.", "{}, small")
ALONE = Runtime.alone(torch.device("cpu"))


def _model() -> Clip:
    torch.manual_seed(3)
    config = preset("ViT-Nano-8")
    return Clip(
        dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, layers=1),
            text=dataclasses.replace(config.text, layers=1),
        )
    ).eval()


def _task(folder: Path) -> ZeroShotTask:
    return ZeroShotTask(
        name="shapes",
        shards=str(folder / "shards"),
        classes=str(folder / "classes.json"),
        templates=TEMPLATES,
    )


def _evaluate(runtime: Runtime, folder: Path, batch_size: int) -> dict[str, float]:
    with torch.no_grad():
        return zero_shot(evaluator(_model(), runtime, batch_size=batch_size), _task(folder))


def _by_hand(folder: Path) -> dict[str, float]:
    """The definition, one class and one image at a time."""
    model, tokenizer = _model(), Tokenizer(context_length=32)
    names = json.loads((folder / "classes.json").read_text())["classes"]
    with torch.no_grad():
        weights = []
        for name in names:
            prompts = [
                model(tokens=tokenizer(t.replace("{}", name))).text_features for t in TEMPLATES
            ]
            weights.append(F.normalize(torch.cat(prompts).mean(0), dim=0))
        top1 = top5 = images = 0
        for batch in eval_batches(
            index_shards(str(folder / "shards")),
            image_size=64,
            batch_size=1,
        ):
            scores = torch.stack(weights) @ model(images=batch.images).image_features[0]
            order = scores.argsort(descending=True).tolist()
            place = order.index(names.index(batch.metadata[0]["label"]))
            top1, top5, images = top1 + (place < 1), top5 + (place < 5), images + 1
    return {"top1": top1 / images, "top5": top5 / images, "images": images, "classes": len(names)}


@pytest.mark.parametrize("batch_size", [7, 64])
def test_equals_the_definition(tmp_path: Path, batch_size: int) -> None:
    write_shards(tmp_path, pairs=41, per_shard=16)
    assert _evaluate(ALONE, tmp_path, batch_size) == pytest.approx(_by_hand(tmp_path))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(tmp_path: Path, world_size: int) -> None:
    write_shards(tmp_path, pairs=29, per_shard=16)
    alone = _evaluate(ALONE, tmp_path, 5)
    assert run_ranks(_evaluate, world_size, tmp_path, tmp_path, 5) == [alone] * world_size


def _classifier(runtime: Runtime, names: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return build_classifier(evaluator(_model(), runtime, batch_size=4), names, TEMPLATES)


def test_more_ranks_than_classes(tmp_path: Path) -> None:
    alone = _classifier(ALONE, ["red bar", "green bar"])
    for result in run_ranks(_classifier, 3, tmp_path, ["red bar", "green bar"]):
        torch.testing.assert_close(result, alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(2))


def test_prompts_of_all_lengths_are_computed_once_and_without_padding() -> None:
    """Every token of every prompt goes through the tower once, and nothing else does."""
    model, tokenizer = _model(), Tokenizer(context_length=32)
    names = ["fox", "a long name of a thing", "42", "x y z", "grey heron standing in the water"]
    computed = []
    model.text.blocks[0].register_forward_pre_hook(
        lambda _, arguments: computed.append(arguments[0].shape[0])
    )
    with torch.no_grad():
        found = build_classifier(evaluator(model, ALONE, batch_size=4), names, TEMPLATES)
        texts = [text for name in names for text in fill(TEMPLATES, name)]
        assert sum(computed) == int(tokenizer.encode_batch(texts)[1].sum())
        expected = model(tokens=tokenizer(texts)).text_features.view(5, 3, -1).mean(1)
    torch.testing.assert_close(found, F.normalize(expected, dim=1))


def test_ties_and_broken_numbers_count_against_the_model() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.9, 0.3], [float("nan"), 0.2, 0.1]])
    assert rank_of_target(scores, torch.tensor([0, 1, 0])).tolist() == [2, 0, 2]


def test_labels_may_be_places_in_the_list(tmp_path: Path) -> None:
    rows = []
    for number in range(5):
        key, members = sample(number)
        members["json"] = json.dumps({"cls": number % 2}).encode()
        rows.append((key, members))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", rows)
    classes = {"label_field": "cls", "classes": ["x", "y"]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    assert _evaluate(ALONE, tmp_path, 3)["images"] == 5


def test_a_label_outside_the_classes_names_the_sample(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs=24)
    (tmp_path / "classes.json").write_text('{"label_field": "label", "classes": ["red circle"]}')
    with pytest.raises(ValueError, match=r"sample 000001 has label='green circle'.* 1 classes"):
        _evaluate(ALONE, tmp_path, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not a classes file"),
        ('{"classes": ["a"]}', "label_field"),
        ('{"label_field": "l", "classes": []}', "not empty"),
        ('{"label_field": "l", "classes": ["a", " "]}', "no name of a class"),
        ('{"label_field": "l", "classes": ["a", "b", "a"]}', "occur twice: a"),
    ],
)
def test_classes_files_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_classes(tmp_path / "c.json")


def test_templates() -> None:
    assert len(imagenet_templates()) == len(set(imagenet_templates())) == 80
    assert all(template.count("{}") == 1 for template in imagenet_templates())
    assert fill(("a {}.",), "{x}") == ["a {x}."]
    with pytest.raises(ValueError, match=r"zero-shot task t: 'a photo' does not hold"):
        ZeroShotTask(name="t", shards="s", classes="c", templates=("a photo",))
