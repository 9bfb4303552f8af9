"""The registry and the paper's numbers: complete, in step, and what is known of them elsewhere."""

from __future__ import annotations

import pytest

from fastclip.eval.datasets import (
    format_datasets,
    nearest,
    paper_datasets,
    paper_results,
)
from fastclip.eval.measures import MAP_11_POINT, MEAN_PER_CLASS, MEAN_TOP1_TOP5, ROC_AUC
from fastclip.eval.prompts import check_templates, imagenet_templates
from fastclip.models.presets import PRESETS


def test_the_papers_27_in_order() -> None:
    names = list(paper_datasets())
    assert len(names) == 27
    assert names[0] == "food101"
    assert names[-1] == "imagenet"
    assert names.index("voc2007") == 7
    for dataset in paper_datasets().values():
        check_templates(dataset.templates, dataset.name)
        assert len(set(dataset.templates)) == len(dataset.templates)
        assert dataset.train > 0
        assert dataset.test > 0
        if dataset.names:
            assert len(set(dataset.names.values())) == dataset.classes
    assert paper_datasets()["imagenet"].templates == imagenet_templates()


def test_measures_are_those_of_table_9() -> None:
    special = {
        MEAN_PER_CLASS: {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"},
        MAP_11_POINT: {"voc2007"},
        ROC_AUC: {"hateful_memes"},
        MEAN_TOP1_TOP5: {"kinetics700"},
    }
    for metric, names in special.items():
        assert {d.name for d in paper_datasets().values() if d.metric is metric} == names


def test_counts_of_the_sets_themselves() -> None:
    """Those that follow from how a set was made, whatever a table says."""
    sets = paper_datasets()
    assert (sets["food101"].train, sets["food101"].test) == (101 * 750, 101 * 250)
    assert (sets["country211"].train, sets["country211"].test) == (211 * 200, 211 * 100)
    assert sets["sun397"].train == sets["sun397"].test == 397 * 50
    assert sets["dtd"].train == 2 * sets["dtd"].test == 2 * 47 * 40
    assert sets["flowers102"].train == 102 * 20
    assert sets["pcam"].train + sets["pcam"].test == 2**18 + 2 * 2**15


def test_results_are_of_the_nine_models() -> None:
    results = paper_results()
    assert set(results) == {name for name in PRESETS if "Nano" not in name}
    for rows in results.values():
        assert list(rows) == list(paper_datasets())
        assert all(0.1 < x.zero_shot < 1 and 0.1 < x.linear_probe < 1 for x in rows.values())


def test_results_that_the_text_states() -> None:
    """Numbers that the paper's text repeats, on ImageNet, STL-10 and MNIST."""
    best = paper_results()["ViT-L-14-336"]
    assert best["imagenet"].zero_shot == pytest.approx(0.762)
    assert best["imagenet"].linear_probe == pytest.approx(0.854)
    assert round(best["mnist"].zero_shot, 2) == 0.88
    assert paper_results()["ViT-L-14"]["stl10"].zero_shot == pytest.approx(0.993)
    assert paper_results()["RN50"]["imagenet"].zero_shot == pytest.approx(0.596)


def test_listing_and_nearest() -> None:
    listing = format_datasets()
    assert all(name in listing for name in paper_datasets())
    assert "11-point mAP" in listing
    assert "ROOT/NAME/dataset.json" in listing
    assert max(map(len, listing.splitlines())) < 200
    assert nearest("Food-101", paper_datasets()) == " (did you mean food101?)"
    assert nearest("zzz", paper_datasets()) == ""
