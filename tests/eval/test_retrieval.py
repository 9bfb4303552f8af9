"""Recall against a plain computation over the whole score matrix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluating import evaluator
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from fastclip.distributed.runtime import Runtime
from fastclip.eval import retrieval as module
from fastclip.eval.retrieval import (
    NEVER,
    RECALL_AT,
    Images,
    Pairs,
    RetrievalTask,
    best_ranks,
    embed_images,
    embed_pairs,
    recall,
    retrieval,
)
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.tokenizer import Tokenizer
from ranks import run_ranks
from shards import sample, write_shards, write_tar

ALONE = Runtime.alone(torch.device("cpu"))


def _model() -> Clip:
    torch.manual_seed(5)
    return Clip(preset("ViT-Nano-8")).eval()


def _evaluate(runtime: Runtime, folder: Path, batch_size: int) -> dict[str, float]:
    with torch.no_grad():
        return retrieval(
            evaluator(_model(), runtime, batch_size=batch_size),
            RetrievalTask(name="shapes", shards=str(folder / "shards")),
        )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(tmp_path: Path, world_size: int) -> None:
    write_shards(tmp_path, pairs=31, per_shard=16)
    alone = _evaluate(ALONE, tmp_path, 6)
    assert alone["images"] == 31
    assert alone["texts"] == 24
    assert 0 < alone["image_to_text_r10"] < 1
    assert run_ranks(_evaluate, world_size, tmp_path, tmp_path, 6) == [alone] * world_size


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
def test_best_ranks_equal_a_sort(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_SCORES", chunk)
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(17, 6, generator=generator), dim=1)
    candidates = F.normalize(torch.randn(23, 6, generator=generator), dim=1)
    groups = torch.randint(0, 5, (23,), generator=generator)
    right = torch.randint(0, 5, (17,), generator=generator)
    expected = []
    for query, group in zip(queries, right, strict=True):
        order = (candidates @ query).argsort(descending=True).tolist()
        first = next(i for i, place in enumerate(order) if groups[place] == group)
        expected.append(first)  # everything before the first right one is wrong
    pairs = (right[:, None] == groups).nonzero()
    assert best_ranks(queries, candidates, pairs).tolist() == expected


def test_texts_may_come_in_any_order_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    right = [(0, 2), (0, 5), (1, 0), (2, 2), (3, 1), (3, 3), (4, 4), (5, 0), (6, 5)]
    pairs = Pairs(
        images=Images(
            index=None,  # type: ignore[arg-type]  # nothing is read
            numbers=range(7),
            features=F.normalize(torch.randn(7, 4, generator=generator), dim=1),
        ),
        captions=list("abcdef"),
        texts=F.normalize(torch.randn(6, 4, generator=generator), dim=1),
        count=9,
        right=torch.tensor(right),
    )
    assert pairs.by_text()[:, 0].tolist() == [0, 0, 1, 2, 2, 3, 4, 5, 5]
    assert set(map(tuple, pairs.by_text().tolist())) == {(text, image) for image, text in right}
    whole = recall(pairs, ALONE)
    order = (pairs.texts @ pairs.images.features.T).argsort(dim=1, descending=True).tolist()
    first = sum((found[0], text) in right for text, found in enumerate(order)) / 6
    assert whole["text_to_image_r1"] == pytest.approx(first)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 7)
    assert recall(pairs, ALONE) == whole


def test_what_is_not_a_number_is_never_right() -> None:
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [float("nan"), 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.6, 0.8], [float("nan"), 1.0]])
    pairs = torch.tensor([[0, 2], [1, 1], [1, 2], [2, 0]])
    ranks = best_ranks(queries, candidates, pairs).tolist()
    assert ranks == [NEVER, 0, NEVER]  # of two right ones the number counts


def test_collapsed_features_find_nothing() -> None:
    same = torch.ones(4, 3)
    pairs = torch.arange(4)[:, None].expand(4, 2)
    assert best_ranks(same, same, pairs).tolist() == [3, 3, 3, 3]


def _captioned(folder: Path) -> list[list[str]]:
    """Eleven images with one to three captions each, some of them shared; what each has."""
    captions = []
    rows = []
    for number in range(11):
        key, members = sample(number)
        about = json.loads(members["json"])
        own = [about["label"], f"one {about['label'].split()[0]} thing", "A  Thing"]
        own = own[: 1 + number % 3] if number != 5 else ["a thing"]
        rows.append((key, {**members, "json": json.dumps({"captions": own}).encode()}))
        captions.append(own)
    folder.mkdir()
    write_tar(folder / "0.tar", rows)
    return captions


def _definition(model: Clip, folder: Path, captions: list[list[str]], template: str) -> list[float]:
    """Recall over the whole score matrix, image by image and text by text."""
    folded = [[" ".join(text.lower().split()) for text in own] for own in captions]
    texts = sorted({text for own in folded for text in own})
    tokenizer = Tokenizer(context_length=32)
    prompts = [tokenizer(template.replace("{}", text)) for text in texts]
    with torch.no_grad():
        text_features = torch.cat([model(tokens=tokens).text_features for tokens in prompts])
        image_features = torch.cat(
            [
                model(images=batch.images).image_features
                for batch in eval_batches(
                    index_shards(str(folder), needs=()), image_size=64, batch_size=1
                )
            ]
        )
    scores = image_features @ text_features.T
    right = torch.tensor([[text in own for text in texts] for own in folded])
    recalls = []
    for way, wanted in ((scores, right), (scores.T, right.T)):
        order = way.argsort(dim=1, descending=True)
        found = wanted.gather(1, order)
        recalls += [float(found[:, :k].any(dim=1).double().mean()) for k in RECALL_AT]
    return [*recalls, len(folded), len(texts), sum(map(len, captions))]


def _evaluate_captions(runtime: Runtime, folder: Path, template: str) -> dict[str, float]:
    task = RetrievalTask(
        name="several", shards=str(folder), caption_key="json:captions", template=template
    )
    with torch.no_grad():
        return retrieval(evaluator(_model(), runtime, batch_size=4), task)


@pytest.mark.parametrize("template", ["{}", "a photo of {}"])
def test_several_captions_of_an_image_are_all_right(tmp_path: Path, template: str) -> None:
    captions = _captioned(tmp_path / "shards")
    found = _evaluate_captions(ALONE, tmp_path / "shards", template)
    expected = _definition(_model(), tmp_path / "shards", captions, template)
    assert list(found.values()) == pytest.approx(expected)
    assert found["texts"] < sum(map(len, captions))  # some are the same text
    assert 0 < found["text_to_image_r1"] < 1
    for ranks in run_ranks(_evaluate_captions, 3, tmp_path, tmp_path / "shards", template):
        assert ranks == found


def test_each_line_may_be_a_caption(tmp_path: Path) -> None:
    key, members = sample(0)
    rows = [(key, {**members, "txt": b"red circle\n\n a round thing\r\nred circle\n"}), sample(1)]
    index = index_shards(str(write_tar(tmp_path / "0.tar", rows)), needs=())
    task = RetrievalTask(name="lines", shards=str(tmp_path), caption_lines=True)
    alone = evaluator(_model(), ALONE)
    with torch.no_grad():
        pairs = embed_pairs(alone, task, embed_images(alone, index))
        whole = replace(task, caption_lines=False)
        assert len(embed_pairs(alone, whole, embed_images(alone, index)).captions) == 2
    assert pairs.captions == ["red circle", "a round thing", "a green circle"]
    assert pairs.right.tolist() == [[0, 0], [0, 1], [1, 2]]
    assert pairs.by_text().tolist() == [[0, 0], [1, 0], [2, 1]]


def test_images_without_a_caption_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [sample(number) for number in range(4)]
    del rows[1][1]["txt"]
    rows[2][1]["txt"] = b"\xff\xfe"
    rows[3][1]["png"] = b"broken"
    write_tar(tmp_path / "0.tar", rows)
    task = RetrievalTask(name="gaps", shards=str(tmp_path))
    with torch.no_grad():
        found = retrieval(evaluator(_model(), ALONE), task)
        assert (found["images"], found["texts"]) == (1, 1)
        said = "left out 2 sample(s): {'missing caption': 1, 'broken caption': 1}"
        assert f"retrieval task gaps, {tmp_path}: {said}" in caplog.text
        nowhere = replace(task, caption_key="json:nothing")
        with pytest.raises(ValueError, match=r"task gaps: no image of .* caption under json:noth"):
            retrieval(evaluator(_model(), ALONE), nowhere)


def test_tasks_that_say_nothing_usable() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"caption_key": "text"}, "caption_key of retrieval task x is txt or json:field"),
        ({"caption_key": "json:"}, "lacks the field's name"),
        ({"template": "a photo"}, "template of retrieval task x: 'a photo' does not hold"),
        ({"name": "a/b"}, "has no /"),
    ]
    for more, message in cases:
        with pytest.raises(ValueError, match=message):
            RetrievalTask(**{"name": "x", "shards": "y", **more})
