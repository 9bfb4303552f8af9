"""The numbers of others: transformers' zero-shot pipeline, and a plain scikit-learn probe.

``pytest -s`` prints the largest differences.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression as Oracle
from torch import Tensor

import peers  # noqa: F401
from evaluating import evaluator
from fastclip.data.eval_loader import EvalBatch
from fastclip.data.index import index_shards
from fastclip.distributed.runtime import Runtime
from fastclip.eval.features import Features, extract_features
from fastclip.eval.linear_probe import linear_probe
from fastclip.eval.logistic_regression import LogisticRegression
from fastclip.eval.zero_shot import build_classifier
from fastclip.models.clip import Clip
from fastclip.models.interop import export_weights
from fastclip.models.presets import preset
from fastclip.ops.similarity import similarity
from fastclip.tokenizer.vocabulary import load_vocabulary
from shards import COLOURS, SHAPES, picture, write_tar

from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, pipeline  # isort: skip

ALONE = Runtime.alone(torch.device("cpu"))
NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
IMAGES = 72
SIZE = 64  # the model's: nobody has to resize anything
TEMPLATE = "A drawing of a {}."
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Clip:
    """Small, of CLIP's vocabulary and context, and sure of itself: its temperature is trained."""
    torch.manual_seed(3)
    config = preset("ViT-Nano-8")
    text = dataclasses.replace(config.text, context_length=77, layers=2)
    clip = Clip(dataclasses.replace(config, text=text)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        clip.logit_scale.fill_(4.0)
    return clip


def _place(number: int) -> int:
    return number * 7 % len(NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of shapes, a little noisy."""
    directory = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(IMAGES):
        colour, shape = NAMES[_place(number)].split()
        shown = Image.open(io.BytesIO(picture(colour, shape, number % 9, SIZE))).convert("RGB")
        noisy = np.asarray(shown, dtype=np.int16) + rng.integers(-60, 60, (SIZE, SIZE, 3))
        written = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(written, "PNG")
        about = json.dumps({"colour": COLOURS.index(colour)}).encode()
        rows.append((f"{number:03d}", {"png": written.getvalue(), "json": about}))
        (directory / f"{number:03d}.png").write_bytes(written.getvalue())
    write_tar(directory / "0.tar", rows)
    return directory


def _colour(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([about["colour"] for about in batch.metadata])
    return labels, torch.ones(len(batch), dtype=torch.bool)


@pytest.fixture(scope="module")
def found(model: Clip, folder: Path) -> Features:
    return extract_features(
        evaluator(model, ALONE), index_shards(str(folder), needs=("json",)), _colour
    )


def _their_tokenizer() -> CLIPTokenizer:
    vocabulary = load_vocabulary("openai")
    merges: Any = [tuple(line.split(" ")) for line in vocabulary.ranks]
    return CLIPTokenizer(vocab=dict(vocabulary.ids), merges=merges, model_max_length=77)


def test_zero_shot_probabilities_are_those_of_transformers(
    model: Clip, folder: Path, found: Features, tmp_path: Path
) -> None:
    export_weights(model, model.config, tmp_path, "huggingface")
    about = model.config
    peer = pipeline(
        "zero-shot-image-classification",
        model=CLIPModel.from_pretrained(tmp_path).eval(),
        tokenizer=_their_tokenizer(),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=list(about.image_mean),
            image_std=list(about.image_std),
        ),
    )
    files = [str(folder / f"{key}.png") for key in found.keys]
    answers = peer(files, candidate_labels=list(NAMES), hypothesis_template=TEMPLATE)
    theirs = torch.tensor(
        [[{a["label"]: a["score"] for a in one}[name] for name in NAMES] for one in answers]
    )
    with torch.no_grad():
        classifier = build_classifier(evaluator(model, ALONE), NAMES, (TEMPLATE,))
        scale = float(model.logit_scale.exp())
        ours = similarity(found.embedding, classifier, scale, normalize=False).softmax(dim=1)
    print(f"zero-shot probabilities differ by {float((ours - theirs).abs().max()):.1e}")
    assert float(ours.max()) > 2 / len(NAMES)  # there is something to agree on
    assert float((ours.amax(dim=0) - ours.amin(dim=0)).max()) > 100 * TOLERANCE
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_linear_probe_is_that_of_scikit_learn(found: Features) -> None:
    places = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1))
    train, test = found.rows(places[: IMAGES * 2 // 3]), found.rows(places[IMAGES * 2 // 3 :])

    def accuracy(scores: Tensor, labels: Tensor) -> float:
        return float((scores.argmax(dim=1) == labels).double().mean())

    result = linear_probe(train, None, test, metric=accuracy)
    peer = Oracle(C=1 / result.strength, solver="lbfgs", max_iter=100_000, tol=1e-10)
    peer.fit(train.representation.double().numpy(), train.labels.numpy())
    theirs = peer.score(test.representation.double().numpy(), test.labels.numpy())
    assert abs(result.value - theirs) <= TOLERANCE
    assert result.value > 1.5 / len(COLOURS)
    fit = LogisticRegression(train.representation, train.labels, len(COLOURS)).fit(result.strength)
    ours = fit.probabilities(test.representation).numpy()
    expected = peer.predict_proba(test.representation.double().numpy())
    print(f"probe's probabilities differ by {np.abs(ours - expected).max():.1e}")
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
