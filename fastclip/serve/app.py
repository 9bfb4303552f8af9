"""`fastclip serve`: the page and its JSON, by FastAPI."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError(
        f"the page is served by FastAPI and uvicorn ({error}): pip install 'fastclip-torch[search]'"
    ) from None

from fastclip.data.decode import BadSampleError
from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex
from fastclip.serve.answers import (
    DEFAULT_RESULTS,
    MAX_RESULTS,
    MAX_TEXT,
    Answers,
    SearchOptions,
    ZeroShotQuestion,
)
from fastclip.serve.assets import add_page
from fastclip.serve.connections import server_config
from fastclip.serve.errors import (
    RequestError,
    on_http_exception,
    on_request_error,
    on_validation_error,
    validation_reason,
)
from fastclip.serve.guard import AllowedHosts, Guard, is_loopback
from fastclip.serve.thumbnails import SIZES, THUMBNAIL_TYPE, whole_image
from fastclip.serve.uploads import read_body, read_image
from fastclip.serve.work import Work

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("fastclip")

FILTER = "filter."
"""What a query parameter that names a field begins with."""

_THREADS = 2
_WAITING = 256
"""A page of 200 results asks for 200 thumbnails, six at a time."""

_QUESTION_BYTES = 1024 * 1024
_FOREVER = "private, max-age=31536000, immutable"
_IMAGE_POLICY = {"content-security-policy": "default-src 'none'; frame-ancestors 'none'; sandbox"}


def build_app(
    index: SearchIndex,
    encoder: Encoder,
    *,
    host: str = "127.0.0.1",
    allow_hosts: Sequence[str] = (),
) -> FastAPI:
    """The application: a page, and the JSON and images that it asks for.

    Args:
        index, encoder: that fit each other (`SearchIndex.check`).
        host: that is listened on; says under which names the server may be addressed.
        allow_hosts: further such names.
    """
    answers = Answers(index, encoder)
    work = Work(threads=_THREADS, waiting=_WAITING)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        work.close()

    app = FastAPI(
        title="fastclip serve",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # both of its viewers come from other servers
        redoc_url=None,
    )
    app.add_middleware(Guard, hosts=AllowedHosts(host, allow_hosts))
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    add_page(app)
    _add_questions(app, answers, work)
    _add_images(app, answers, work)
    return app


def search_options(
    request: Request,
    k: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = DEFAULT_RESULTS,
    exact: bool = False,
) -> SearchOptions:
    """The options of a search in its address; ``filter.style=noto`` names a field."""
    filters: dict[str, str] = {}
    named: set[str] = set()
    for name, value in request.query_params.multi_items():
        if name in named:
            raise RequestError(400, f"{name[:60]!r} is given more than once")
        named.add(name)
        if name.startswith(FILTER):
            filters[name.removeprefix(FILTER)] = value
        elif name not in ("q", "image", "k", "exact"):
            raise RequestError(400, f"{name[:60]!r} is no parameter of a search")
    return SearchOptions(k=k, exact=exact, filters=filters)


Options = Annotated[SearchOptions, Depends(search_options)]


def _add_questions(app: FastAPI, answers: Answers, work: Work) -> None:
    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        """The index, its model and what can be filtered by."""
        return answers.info()

    @app.get("/api/search")
    async def search(
        options: Options,
        q: Annotated[str | None, Query(max_length=MAX_TEXT)] = None,
        image: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """Images by a text `q`, or by the token of an `image` that was sent."""
        if (q is None) == (image is None):
            raise RequestError(400, "search by q, a text, or by image, the token of one")
        if q is not None:
            return await work.run(answers.by_text, q, options)
        return await work.run(answers.by_upload, image or "", options)

    @app.post("/api/search")
    async def search_by_image(request: Request, options: Options) -> dict[str, Any]:
        """Images by the image that is the body; answers with its token, too."""
        content = await read_image(request)
        return await work.run(answers.by_content, content, options)

    @app.post("/api/images")
    async def send_image(request: Request) -> dict[str, str]:
        """Keep the image that is the body, for a while; answers with its token."""
        content = await read_image(request)
        return {"image": (await work.run(answers.uploads.add, content)).token}

    @app.get("/api/similar/{number}")
    async def similar(number: str, options: Options) -> dict[str, Any]:
        """Images that are like one of the index."""
        return await work.run(answers.similar, _number(number), options)

    @app.get("/api/images/{number}")
    async def image_record(number: str) -> dict[str, Any]:
        """What is known of an image of the index."""
        return answers.describe(_number(number))

    @app.post("/api/zero_shot")
    async def zero_shot(request: Request) -> dict[str, Any]:
        """Probabilities of classes for an image; the body is a `ZeroShotQuestion`."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "the question is application/json")
        body = await read_body(request, _QUESTION_BYTES, "the question")
        try:
            question = ZeroShotQuestion.model_validate_json(body)
        except ValidationError as error:
            raise RequestError(400, validation_reason(error.errors())) from None
        return await work.run(answers.zero_shot, question)


def _add_images(app: FastAPI, answers: Answers, work: Work) -> None:
    @app.get("/thumbnail/{number}")
    async def thumbnail(request: Request, number: str, size: str = "320") -> Response:
        """An image of the index, drawn small."""
        place = _number(number)
        answers.record(place)
        if size not in map(str, SIZES):
            raise RequestError(400, f"size is one of {', '.join(map(str, SIZES))}")
        headers = _cached(request, f"{answers.version}-{place}-{size}", answers.version)
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = answers.thumbnails.kept(place, int(size))
        if content is None:
            content = await work.run(_read, place, answers.thumbnails.get, place, int(size))
        return Response(content, media_type=THUMBNAIL_TYPE, headers=headers)

    @app.get("/image/{number}")
    async def image(request: Request, number: str) -> Response:
        """An image of the index as it is, or drawn anew where browsers do not draw its format."""
        place = _number(number)
        answers.record(place)
        headers = _cached(request, f"{answers.version}-{place}", answers.version)
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content, kind = await work.run(
            _read, place, lambda: whole_image(answers.index.image(place))
        )
        return Response(content, media_type=kind, headers=headers)

    @app.get("/upload/{token}")
    async def upload(token: str) -> Response:
        """An image that was sent, drawn small."""
        content = answers.uploads.get(token).thumbnail
        headers = {**_IMAGE_POLICY, "cache-control": "private, max-age=3600"}
        return Response(content, media_type=THUMBNAIL_TYPE, headers=headers)


def _number(text: str) -> int:
    """Of an image, in a path; what is no number is no image's."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise RequestError(404, "images have numbers, and this is none")
    return int(text)


def _cached(request: Request, tag: str, version: str) -> dict[str, str]:
    """Headers of an image: kept for good under an address that names the index's version."""
    versioned = request.query_params.get("v") == version
    return {
        **_IMAGE_POLICY,
        "etag": f'"{tag}"',
        "cache-control": _FOREVER if versioned else "private, no-cache",
    }


def _read(number: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, with its troubles in the log: they name files of this machine."""
    try:
        return function(*args, **kwargs)
    except (OSError, ValueError, BadSampleError) as error:
        logger.warning("image %d: %s", number, error)
        raise RequestError(500, f"image {number} cannot be read; the log says why") from None


def serve(
    index_path: Path,
    *,
    model: Path | None = None,
    shards_root: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve an index's page until the process is interrupted.

    Args:
        model: run or checkpoint that made the index; by default where it was then.
        shards_root: where the shards are now, if they were moved; see `SearchIndex.open`.
        port: 0 takes a free one.
        allow_hosts: names under which the server may be addressed, beside its own.

    Raises:
        FileNotFoundError: there is no index or no model.
        ValueError: the index is damaged, or another model made it.
        OSError: the address cannot be listened on.
    """
    index = SearchIndex.open(index_path, shards_root=shards_root)
    encoder = Encoder(model or Path(index.info.model_path))
    index.check(encoder)
    listening = listen(host, port)
    encoder.texts(["a text"])  # the first forward pass is slow; it shall be nobody's
    if not is_loopback(host):
        logger.warning(
            "the page has no login: whoever reaches %s can search the images and see them", host
        )
    address = f"[{host}]" if ":" in host else host
    logger.info(
        "%s images of %s at http://%s:%d (interrupt to stop)",
        f"{index.info.count:,}", index_path, address, listening.getsockname()[1],
    )  # fmt: skip
    config = server_config(build_app(index, encoder, host=host, allow_hosts=allow_hosts))
    with contextlib.suppress(KeyboardInterrupt):  # that is how it ends
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, or an OSError that says in a line why it cannot."""
    if not 0 <= port <= 65535:
        raise OSError(f"ports are from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host}:{port} is no address of this machine: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is in use: name another with --port (0: any free one)"
        else:
            reason = f"{host}:{port} cannot be listened on: {error.strerror}"
        raise OSError(reason) from None
    return listening
