"""An open index: searches against the definition, filters, records, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastclip.search.embed import embed
from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex, file_hash
from fastclip.search.info import Description, VectorsInfo, load_description, save_description
from indexed import SETTINGS, write_index, write_model
from shards import evaluation_pixels, sample, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    write_index(made)
    return made


@pytest.fixture(scope="module")
def index(folder: Path) -> SearchIndex:
    return SearchIndex.open(folder / "index")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "index", tmp_path / "index"))


def _all_features(index: SearchIndex) -> torch.Tensor:
    return index.features(range(index.info.count))


def test_features_are_the_models_of_the_images_as_evaluation_sees_them(
    index: SearchIndex, encoder: Encoder
) -> None:
    pixels = torch.stack(
        [torch.tensor(evaluation_pixels(sample(n)[1]["png"], 64)) for n in range(48)]
    )
    with torch.no_grad():
        expected = encoder.model(images=pixels.permute(0, 3, 1, 2)).image_features
    torch.testing.assert_close(_all_features(index), expected, rtol=0, atol=1e-3)
    norms = _all_features(index).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(48), rtol=0, atol=5e-4)


@pytest.mark.parametrize("k", [1, 7, 48, 100])
def test_search_is_the_sorted_list_of_cosine_similarities(
    index: SearchIndex, encoder: Encoder, k: int
) -> None:
    queries = encoder.texts(["a red circle", "a bar"])
    similarities = queries @ _all_features(index).T
    for row, found in zip(similarities, index.search(queries, k), strict=True):
        values, order = row.sort(descending=True, stable=True)
        assert len(found) == min(k, 48)
        assert [hit.score for hit in found] == pytest.approx(values[:k].tolist(), abs=1e-6)
        gaps = (values[:-1] - values[1:]).tolist()
        if min(gaps[:k]) > 1e-5:  # otherwise rounding may exchange neighbours
            assert [hit.record.number for hit in found] == order[:k].tolist()


def test_equal_scores_stand_in_the_order_of_their_numbers(index: SearchIndex) -> None:
    numbers, scores = index.nearest(_all_features(index)[5:6], 48)
    pairs = list(zip(scores[0], numbers[0], strict=True))
    assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def test_an_image_finds_itself_first(index: SearchIndex, encoder: Encoder) -> None:
    contents = [index.image(number) for number in (0, 17, 47)]
    for number, found in zip((0, 17, 47), index.search(encoder.images(contents), 1), strict=True):
        assert found[0].record.number == number
        assert found[0].score == pytest.approx(1.0, abs=1e-3)


def test_records_say_what_the_shards_hold(index: SearchIndex, folder: Path) -> None:
    for number in (0, 15, 16, 47):
        record, (key, members) = index.record(number), sample(number)
        assert record.number == number
        assert (record.key, record.caption) == (key, members["txt"].decode())
        assert record.fields == {"label": json.loads(members["json"])["label"]}
        assert (record.width, record.height) == (72, 72)
        assert record.shard == str(folder / "shards" / f"{number // 16:05d}.tar")
        assert index.image(number) == members["png"]
    assert len(index.info.fields["label"]) == 24
    assert list(index.info.fields["label"]) == sorted(index.info.fields["label"])


@pytest.mark.parametrize("number", [-1, 48, True])
def test_there_are_no_other_records(index: SearchIndex, number: int) -> None:
    for ask in (index.record, index.image, lambda n: index.features([n])):
        with pytest.raises(ValueError, match="numbered from 0 to 47"):
            ask(number)


def test_a_filtered_search_is_exact(index: SearchIndex, encoder: Encoder) -> None:
    queries = encoder.texts(["a red circle", "something else"])
    everything = index.search(queries, 48)
    filtered = index.search(queries, 10, filters={"label": "blue square"})
    for whole, found in zip(everything, filtered, strict=True):
        expected = [hit for hit in whole if hit.record.fields["label"] == "blue square"]
        assert len(expected) == 2
        assert [hit.record.number for hit in found] == [hit.record.number for hit in expected]


def test_filters_that_mean_nothing(index: SearchIndex, encoder: Encoder) -> None:
    query = encoder.texts(["x"])
    with pytest.raises(ValueError, match=r"filter lable does not exist; did you mean 'label'"):
        index.search(query, 3, filters={"lable": "red bar"})
    with pytest.raises(ValueError, match=r"label=red bat does not exist; did you mean 'red bar'"):
        index.search(query, 3, filters={"label": "red bat"})


def test_queries_that_do_not_fit(index: SearchIndex) -> None:
    feature = F.normalize(torch.ones(1, index.info.embed_dim))
    for k in (0, -1, 1001, True):
        with pytest.raises(ValueError, match="number of results is from 1 to 1000"):
            index.search(feature, k)
    with pytest.raises(ValueError, match=r"queries are \[number, \d+\]"):
        index.search(feature[0], 3)
    with pytest.raises(ValueError, match=r"queries are \[number, \d+\]"):
        index.search(feature[:, 1:], 3)
    for wrong in (feature * 2, feature * float("nan"), feature * 0):
        with pytest.raises(ValueError, match="unit length"):
            index.search(wrong, 3)
    assert index.search(feature[:0], 3) == []


def test_threads_find_what_one_does(index: SearchIndex, encoder: Encoder) -> None:
    texts = [f"a {colour} thing" for colour in ("red", "green", "blue", "black")] * 4
    alone = [index.search(encoder.texts([text]), 5) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: index.search(encoder.texts([text]), 5), texts)) == alone


def test_another_model_is_refused(index: SearchIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with the model .* name that model"):
        index.check(Encoder(write_model(tmp_path / "other", seed=4)))
    with pytest.raises(ValueError, match=r"features of \d+ numbers and .* makes 32"):
        index.check(Encoder(write_model(tmp_path / "narrow", embed_dim=32)))
    index.check(Encoder(write_model(tmp_path / "same")))


def test_the_digest_is_of_weights_and_configuration(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a")
    before = Encoder(model).digest
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", metadata={"other": "file"})
    assert Encoder(model).digest == before
    weights["logit_scale"] += 1e-3
    save_file(weights, model / "model.safetensors")
    assert Encoder(model).digest != before


def test_moved_shards_are_found_by_their_root(tmp_path: Path) -> None:
    directory = write_index(tmp_path, pairs=20)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"shards/00000.tar is not there.*--shards-root"):
        SearchIndex.open(directory).image(0)
    moved = SearchIndex.open(directory, shards_root=tmp_path / "elsewhere")
    assert moved.image(17) == sample(17)[1]["png"]


def test_other_shards_in_their_place_are_refused(tmp_path: Path) -> None:
    directory = write_index(tmp_path, pairs=20)
    shutil.copy(tmp_path / "shards/00000.tar", tmp_path / "shards/00001.tar")
    with pytest.raises(ValueError, match=r"00001.tar has .* bytes, and"):
        SearchIndex.open(directory).image(16)
    content = bytearray((tmp_path / "shards/00000.tar").read_bytes())
    content[700] ^= 1
    (tmp_path / "shards/00000.tar").write_bytes(content)
    with pytest.raises(ValueError, match="000000 is not the image that was embedded"):
        SearchIndex.open(directory).image(0)


def test_no_index(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no index \(index.json\)"):
        SearchIndex.open(tmp_path)
    (copy / "index.json").rename(copy / "unfinished.json")
    with pytest.raises(FileNotFoundError, match="not finished: run its fastclip embed again"):
        SearchIndex.open(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no description of an index"),
        (b"[]", "no description of an index"),
        (b'{"format": 99}', "format 99, and this version reads 1"),
        (b'{"format": 1}', "lacks model"),
        (b"[" * 100_000, "no description of an index"),
    ],
)
def test_descriptions_that_are_none(copy: Path, content: bytes, message: str) -> None:
    (copy / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SearchIndex.open(copy)


Change = Callable[[Description], Description]


def _part(**changes: object) -> Change:
    def change(before: Description) -> Description:
        part = dataclasses.replace(before.parts[1], **changes)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(before, parts=(before.parts[0], part, *before.parts[2:]))

    return change


def _shard(**changes: Any) -> Change:
    def change(before: Description) -> Description:
        shard = dataclasses.replace(before.shards[0], **changes)
        return dataclasses.replace(before, shards=(shard, *before.shards[1:]))

    return change


def _vectors(**changes: Any) -> Change:
    return lambda before: dataclasses.replace(
        before, vectors=dataclasses.replace(VectorsInfo(kind="flat"), **changes)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_part(shard=3), "of shard 3, which is no one"),
        (_part(shard=-1), "of shard -1, which is no one"),
        (_part(records=17), "more records than samples"),
        (_part(records=15), "is damaged"),
        (_part(first=1), "more samples than its shard"),
        (_part(first=-1), r"index.json: parts\[1\].first is a whole number from 0 to 2\*\*63 - 1"),
        (_part(samples=0), r"index.json: parts\[1\].samples is a whole number from 1 "),
        (_part(records=10**30), r"index.json: parts\[1\].records is .*, not 10{30}$"),
        (_shard(size=10**30), r"index.json: shards\[0\].size is .*, not 10{30}$"),
        (_shard(size=-1), r"index.json: shards\[0\].size is .*, not -1$"),
        (_shard(samples=2**63), r"index.json: shards\[0\].samples is "),
        (lambda d: dataclasses.replace(d, parts=()), "index.json: parts are none"),
        (
            lambda d: dataclasses.replace(d, model=dataclasses.replace(d.model, context_length=0)),
            "model.context_length is a whole number from 1 ",
        ),
        (_vectors(recall_images=1.5), "vectors.recall_images is from 0 to 1, not 1.5"),
        (_vectors(recall_texts=float("nan")), "vectors.recall_texts is from 0 to 1, not nan"),
        (_vectors(recall_texts=10**400), "a recall is from 0 to 1"),
        (_vectors(probes=-1), "vectors.probes is a whole number from 0 "),
        (_vectors(kind="ivf", file="v", probes=0), "vectors.probes is a whole number from 1 "),
        (
            _vectors(kind="ivf", file="v", probes=1, candidates=10**30),
            "vectors.candidates is a whole number from 1 ",
        ),
        (_vectors(file="../part-00001.safetensors"), "no name of a file"),
        (_part(file="../part-00001.safetensors"), "no name of a file"),
        (_part(file="part-00000.safetensors"), "named twice"),
        (_part(file="gone.safetensors"), "gone.safetensors is not there"),
        (_part(sha256="0" * 64), "SHA-256"),
        (lambda d: dataclasses.replace(d, dtype="float32"), "is damaged"),
        (lambda d: dataclasses.replace(d, fields=("label", "style")), "is damaged"),
        (lambda d: dataclasses.replace(d, vectors=None), "names no vectors"),
    ],
)
def test_descriptions_that_contradict_the_files(copy: Path, change: Change, message: str) -> None:
    path = copy / "index.json"
    save_description(path, change(load_description(path)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SearchIndex.open(copy)


@pytest.mark.parametrize("at", [4, 60, -1])
def test_a_flipped_byte_is_seen(copy: Path, at: int) -> None:
    path = copy / "part-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00002.safetensors is damaged"):
        SearchIndex.open(copy)


def _places_outside(tensors: dict[str, torch.Tensor]) -> None:
    tensors["places"][3, 1] = 1 << 40


def _negative_places(tensors: dict[str, torch.Tensor]) -> None:
    tensors["places"][3, 0] = -512


def _overlapping_keys(tensors: dict[str, torch.Tensor]) -> None:
    tensors["key_ends"][3] = 0


def _long_captions(tensors: dict[str, torch.Tensor]) -> None:
    tensors["caption_ends"][-1] = 1 << 40


def _unknown_labels(tensors: dict[str, torch.Tensor]) -> None:
    tensors["field.label"][2] = 16


def _wrong_kind(tensors: dict[str, torch.Tensor]) -> None:
    tensors["hashes"] = tensors["hashes"].double()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_places_outside, "outside of its shard"),
        (_negative_places, "outside of its shard"),
        (_overlapping_keys, "keys overlap"),
        (_long_captions, "captions overlap"),
        (_unknown_labels, "values of label are not there"),
        (_wrong_kind, "hashes are torch.float64"),
    ],
)
def test_parts_made_to_mislead_are_refused_with_their_hashes_right(
    copy: Path, tamper: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    path = copy / "part-00001.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tamper(tensors)
    save_file(tensors, path, metadata=metadata)
    change = _part(sha256=file_hash(path))
    save_description(copy / "index.json", change(load_description(copy / "index.json")))
    with pytest.raises(ValueError, match=message):
        SearchIndex.open(copy)


def test_lists_find_what_the_exact_search_does(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    shards = write_shards(tmp_path, pairs=120, per_shard=50)
    model = write_model(tmp_path / "model")
    settings = dataclasses.replace(SETTINGS, vectors="ivf")
    made = embed(str(shards), model, tmp_path / "index", settings)
    index, encoder = SearchIndex.open(tmp_path / "index"), Encoder(model)
    assert made.vectors == index.info.vectors
    assert index.info.vectors.kind == "ivf"
    assert index.info.vectors.recall_images == pytest.approx(1.0)
    assert index.info.vectors.recall_texts == pytest.approx(1.0)
    queries = encoder.texts(["a red circle", "a bar"])
    exact = index.search(queries, 5, exact=True)
    for row, expected in zip(index.search(queries, 5), exact, strict=True):
        found = [hit.score for hit in row]
        assert found == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert [len(row) for row in index.search(queries, 1000)] == [120, 120]
    (label,) = index.search(queries[:1], 50, filters={"label": "red circle"})
    assert len(label) == 5
    vectors = dataclasses.replace(index.info.vectors, candidates=2**62)  # more than there are
    where = tmp_path / "index" / "index.json"
    save_description(where, dataclasses.replace(index.description, vectors=vectors))
    (row,) = SearchIndex.open(tmp_path / "index").search(queries[:1], 5)
    assert [hit.score for hit in row] == pytest.approx([hit.score for hit in exact[0]], abs=1e-6)
    path = tmp_path / "index" / index.info.vectors.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"vectors-120\.safetensors is damaged"):
        SearchIndex.open(tmp_path / "index")
