"""The page's own files, read once from the package: nothing else can be asked for by a path."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response

from fastclip.serve.errors import RequestError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGE = "page.html"


def add_page(app: FastAPI) -> None:
    """The page at ``/`` and its style and scripts under ``/static``."""
    assets = {
        each.name: (each.read_bytes(), _TYPES[each.name[each.name.rindex(".") :]])
        for each in files("fastclip.serve").joinpath("static").iterdir()
    }

    def answer(request: Request, name: str) -> Response:
        content, kind = assets[name]
        tag = f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(request, _PAGE)

    @app.get("/static/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        if name not in assets or name == _PAGE:
            raise RequestError(404, "there is nothing here")
        return answer(request, name)
