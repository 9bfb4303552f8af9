"""Errors as answers: a status and one sentence in JSON."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        reason: one sentence for whoever sent it.
        hang_up: whether the connection is closed, as more of a body may come.
    """

    def __init__(self, status: int, reason: str, *, hang_up: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.hang_up = hang_up


def error_response(status: int, reason: str, *, hang_up: bool = False) -> JSONResponse:
    """The one form of all errors: ``{"error": reason}``."""
    headers = {"cache-control": "no-store"}
    if hang_up:
        headers["connection"] = "close"
    if status == 503:
        headers["retry-after"] = "1"
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


async def on_request_error(_: Request, error: Exception) -> JSONResponse:
    """For `RequestError`."""
    assert isinstance(error, RequestError)
    return error_response(error.status, error.reason, hang_up=error.hang_up)


async def on_http_exception(_: Request, error: Exception) -> JSONResponse:
    """For what the framework refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    reasons = {404: "there is nothing here", 405: "not by this method"}
    return error_response(error.status_code, reasons.get(error.status_code, str(error.detail)))


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """For parameters of a wrong type or out of their range; names the first."""
    assert isinstance(error, RequestValidationError)
    return error_response(400, validation_reason(error.errors()))


def validation_reason(errors: object) -> str:
    """One sentence on the first of pydantic's errors."""
    assert isinstance(errors, (list, tuple))
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("query", "path", "body"))
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message
