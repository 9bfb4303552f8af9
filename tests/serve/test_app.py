"""`build_app` by HTTP: right answers against the index and model themselves, and all refusals."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex
from fastclip.serve.answers import MAX_CLASSES, MAX_RESULTS, MAX_TEXT
from fastclip.serve.uploads import MAX_IMAGE_BYTES
from indexed import write_index
from served import served
from shards import picture

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("indexed"))


@pytest.fixture(scope="module")
def client(index_path: Path) -> Iterator[httpx.Client]:
    with served(index_path) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def index(index_path: Path) -> SearchIndex:
    return SearchIndex.open(index_path)


@pytest.fixture(scope="module")
def encoder(index: SearchIndex) -> Encoder:
    return Encoder(Path(index.info.model_path))


def _refused(answer: httpx.Response, status: int, message: str) -> None:
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert message in answer.json()["error"]


def _bomb(side: int) -> bytes:
    """A small PNG that says it is of side × side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
        + chunk(b"IEND", b"")
    )


def test_info(client: httpx.Client, index: SearchIndex) -> None:
    info = client.get("/api/info").json()
    assert (info["count"], info["embed_dim"]) == (48, index.info.embed_dim)
    assert info["model_digest"] == index.info.model_digest
    assert info["fields"]["label"] == list(index.info.fields["label"])
    numbers = [each["number"] for each in info["examples"]]
    assert len(numbers) == 24
    assert numbers == sorted(set(numbers))


def test_search_by_text(client: httpx.Client, index: SearchIndex, encoder: Encoder) -> None:
    answer = client.get("/api/search", params={"q": "  a red circle ", "k": 7})
    (expected,) = index.search(encoder.texts(["a red circle"]), 7)
    results = answer.json()["results"]
    assert [each["number"] for each in results] == [each.record.number for each in expected]
    for result, found in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(found.score, abs=1e-6)
        assert result["caption"] == found.record.caption
        assert result["fields"] == dict(found.record.fields)
        assert result["shard"] == Path(found.record.shard).name


def test_filters(client: httpx.Client) -> None:
    options = {"q": "circle", "k": "200", "exact": "true", "filter.label": "blue square"}
    results = client.get("/api/search", params=options).json()["results"]
    assert {each["fields"]["label"] for each in results} == {"blue square"}
    assert len(results) == 2
    _refused(client.get("/api/search?q=a&filter.label=nope"), 400, "label=nope")
    _refused(client.get("/api/search?q=a&filter.colour=red"), 400, "filter colour")


def test_search_by_an_image(client: httpx.Client, index: SearchIndex) -> None:
    content = index.image(10)
    answer = client.post("/api/search?k=5", content=content, headers=PNG).json()
    assert answer["results"][0]["number"] == 10
    assert answer["results"][0]["score"] > 0.999
    again = client.get("/api/search", params={"image": answer["image"], "k": 5}).json()
    assert again["results"] == answer["results"]
    assert client.post("/api/images", content=content, headers=PNG).json() == {
        "image": answer["image"]
    }
    shown = client.get(f"/upload/{answer['image']}")
    assert Image.open(io.BytesIO(shown.content)).format == "WEBP"


def test_an_image_that_is_not_kept(client: httpx.Client) -> None:
    _refused(client.get("/api/search", params={"image": "0" * 32}), 404, "not kept")
    _refused(client.get(f"/upload/{'0' * 32}"), 404, "not kept")
    _refused(_zero_shot(client, image="0" * 32), 404, "not kept")


def test_similar(client: httpx.Client, index: SearchIndex) -> None:
    answer = client.get("/api/similar/3?k=47").json()
    numbers = [each["number"] for each in answer["results"]]
    assert sorted([*numbers, 3]) == list(range(48))
    assert answer["query"]["key"] == index.record(3).key
    assert client.get(f"/api/similar/3?k={MAX_RESULTS}").status_code == 200
    assert client.get("/api/images/3").json() == answer["query"]


def _zero_shot(client: httpx.Client, **question: Any) -> httpx.Response:
    return client.post("/api/zero_shot", json={"classes": ["a", "b"], **question})


def test_zero_shot(client: httpx.Client, index: SearchIndex, encoder: Encoder) -> None:
    names = ["red circle", "blue square", "purple bar"]
    answer = _zero_shot(client, number=4, classes=names, template="a drawing of a {}.").json()
    texts = encoder.texts([f"a drawing of a {name}." for name in names])
    scale = min(encoder.model.logit_scale.exp().item(), encoder.model.config.max_logit_scale)
    image = torch.nn.functional.normalize(index.features([4])[0], dim=0)
    expected = (scale * texts @ image).softmax(0).tolist()
    found = {each["name"]: each["probability"] for each in answer["classes"]}
    assert found == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    token = client.post("/api/images", content=index.image(4), headers=PNG).json()["image"]
    sent = _zero_shot(client, image=token, classes=names, template="a drawing of a {}.").json()
    for one, other in zip(answer["classes"], sent["classes"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-2)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "name one image"),
        ({"number": 1, "image": "x"}, "name one image"),
        ({"number": 1, "classes": ["a"]}, "classes"),
        ({"number": 1, "classes": [str(n) for n in range(MAX_CLASSES + 1)]}, "classes"),
        ({"number": 1, "classes": ["a", " a "]}, "'a' occurs twice"),
        ({"number": 1, "classes": ["a", " "]}, "classes.1"),
        ({"number": 1, "classes": ["a", "x" * (MAX_TEXT + 1)]}, "classes.1"),
        ({"number": 1, "template": "a photo"}, "exactly one {}"),
        ({"number": 1, "classes": ["a", "\ud800"]}, ""),
        ({"number": "1"}, "number"),
        ({"number": True}, "number"),
        ({"number": -1}, "number"),
        ({"number": 1, "more": 2}, "more"),
    ],
)
def test_zero_shot_questions_that_are_none(
    client: httpx.Client, question: dict[str, Any], message: str
) -> None:
    body = json.dumps({"classes": ["a", "b"], **question})
    headers = {"Content-Type": "application/json"}
    _refused(client.post("/api/zero_shot", content=body, headers=headers), 400, message)


def test_zero_shot_bodies_that_are_none(client: httpx.Client) -> None:
    _refused(_zero_shot(client, number=48), 404, "no image 48")
    _refused(client.post("/api/zero_shot", content=b"{}"), 415, "application/json")
    json_type = {"Content-Type": "application/json"}
    _refused(client.post("/api/zero_shot", content=b"{", headers=json_type), 400, "JSON")
    long = b'"' + b"x" * (2 << 20) + b'"'
    _refused(client.post("/api/zero_shot", content=long, headers=json_type), 413, "1 MiB")
    deep = b"[" * 100_000
    assert client.post("/api/zero_shot", content=deep, headers=json_type).status_code == 400


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"", "image/png", 400, "0 bytes"),
        (picture("red", "circle", 3)[:200], "image/png", 400, "damaged"),
        (picture("red", "circle", 3)[:20], "image/png", 400, "damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "image/jpeg", 400, "damaged"),
        (_bomb(20_000), "image/png", 413, "50 megapixels"),
        (_bomb(7_072), "image/png", 413, "50 megapixels"),
        (SVG, "image/svg+xml", 415, "image/svg+xml"),
        (SVG, "image/png", 415, "not an image"),
        (b"<html><script>alert(1)</script>", "image/gif", 415, "not an image"),
        (picture("red", "circle", 3), "text/html", 415, "text/html"),
        (picture("red", "circle", 3), "", 415, "without a type"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/x-eps", 415, "not an image"),
        (bytes(MAX_IMAGE_BYTES + 1), "image/png", 413, "10 MiB"),
    ],
)
def test_uploads_that_are_refused(
    client: httpx.Client, content: bytes, kind: str, status: int, message: str
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    for path in ("/api/search", "/api/images"):
        _refused(client.post(path, content=content, headers=headers), status, message)


def test_a_body_of_no_announced_length(client: httpx.Client) -> None:
    parts = iter([bytes(1 << 20)] * 12)
    _refused(client.post("/api/images", content=parts, headers=PNG), 413, "10 MiB")


def test_an_endless_body_is_cut_off(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 20
            yield bytes(1 << 20)

    with contextlib.suppress(httpx.TransportError):  # if the answer is not seen any more
        _refused(client.post("/api/images", content=endless(), headers=PNG), 413, "10 MiB")
    assert sent < 1 << 28
    assert client.get("/api/info").status_code == 200


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/api/search", "search by q"),
        ("/api/search?q=a&image=b", "search by q"),
        ("/api/search?q=%20", "empty"),
        (f"/api/search?q={'x' * (MAX_TEXT + 1)}", "q: "),
        ("/api/search?q=a&k=0", "k: "),
        (f"/api/search?q=a&k={MAX_RESULTS + 1}", "k: "),
        ("/api/search?q=a&k=x", "k: "),
        ("/api/search?q=a&limit=3", "'limit' is no parameter"),
        ("/api/search?q=a&q=b", "'q' is given more than once"),
        ("/api/search?q=a&k=3&k=4", "'k' is given more than once"),
        (
            "/api/search?q=a&filter.label=red+circle&filter.label=blue+square",
            "'filter.label' is given more than once",
        ),
        ("/api/similar/1?exact=true&exact=false", "'exact' is given more than once"),
        ("/thumbnail/1?size=5000", "size is one of"),
    ],
)
def test_parameters_that_are_refused(client: httpx.Client, address: str, message: str) -> None:
    _refused(client.get(address), 400, message)


@pytest.mark.parametrize(
    "address",
    [
        "/thumbnail/48",
        "/thumbnail/-1",
        "/thumbnail/1.5",
        "/thumbnail/" + "9" * 5000,
        "/thumbnail/٣",
        "/image/48",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image/%2e%2e/%2e%2e/etc/passwd",
        "/api/similar/48",
        "/api/similar/x",
        "/api/images/48",
        "/static/..%2fapp.py",
        "/static/../app.py",
        "/static/page.html",
        "/static/%2fetc%2fpasswd",
        "/docs",
        "/redoc",
        "/index.json",
    ],
)
def test_nothing_else_is_there(client: httpx.Client, address: str) -> None:
    assert client.get(address).status_code == 404
    assert list(client.get(address).json()) == ["error"]


def test_thumbnails(client: httpx.Client, index: SearchIndex) -> None:
    answer = client.get("/thumbnail/7?size=160")
    assert answer.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == ("WEBP", (72, 72))
    whole = client.get("/image/7")
    assert (whole.headers["content-type"], whole.content) == ("image/png", index.image(7))
    version = client.get("/api/info").json()["version"]
    for path in ("/thumbnail/7?size=160&v=", "/image/7?v="):
        kept = client.get(path + version)
        assert "immutable" in kept.headers["cache-control"]
        assert "no-cache" in client.get(path + "old").headers["cache-control"]
        assert "sandbox" in kept.headers["content-security-policy"]
        known = {"If-None-Match": kept.headers["etag"]}
        again = client.get(path + version, headers=known)
        assert (again.status_code, again.content) == (304, b"")
    assert len({client.get(f"/thumbnail/{n}").headers["etag"] for n in range(5)}) == 5


def test_every_answer_is_confined(client: httpx.Client) -> None:
    for path in ("/", "/static/page.css", "/api/info", "/nothing", "/thumbnail/1", "/upload/x"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "unsafe" not in policy


def test_the_page_names_no_other_server(client: httpx.Client) -> None:
    for name in ("", "static/page.css", "static/main.js", "static/search.js", "static/icon.svg"):
        text = client.get(f"/{name}").text.replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text
        assert "style=" not in text  # the policy would drop it
