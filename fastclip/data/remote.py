"""Calls to other machines' file systems by fsspec: watched, tried again, without secrets in errors.

`fastclip.data.remote_files` finds files by them, `fastclip.data.shard_cache` fetches whole ones.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger("fastclip")

T = TypeVar("T")

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts: the first doubles up to the longest."""

HTTP = ("http", "https")
"""Protocols that know files but no folders."""

_PASSWORD = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*@|(?<=tps://)[^/\s@]*@|(?<=ttp://)[^/\s@]*@")
_QUERY = re.compile(
    r"(https?://[^\s?'\"]*)\?(?:(?!::)[^\s'\"])*|\?(?:(?!::)[^\s'\"=])*=(?:(?!::)[^\s'\"])*"
)


@dataclass(frozen=True)
class RemoteSettings:
    """How files are fetched and kept; `DataConfig` says what each means."""

    cache_dir: Path
    cache_bytes: int
    retries: int
    timeout_seconds: float


def default_cache_dir() -> Path:
    """Where copies are kept unless a setting says otherwise."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "fastclip" / "shards"


_settings: RemoteSettings | None = None


def configure(cache_dir: str, cache_gigabytes: float, retries: int, timeout_seconds: float) -> None:
    """Set for this process what `DataConfig` calls cache_dir, cache_gigabytes and remote_*."""
    global _settings
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    _settings = RemoteSettings(directory, int(cache_gigabytes * 1e9), retries, timeout_seconds)


def settings() -> RemoteSettings:
    """This process's."""
    if _settings is None:
        configure("", 100, 5, 60)
    assert _settings is not None
    return _settings


class RemoteError(OSError):
    """A file that could not be had; the message names it, without what may be secret.

    Attributes:
        reason: the message without the address.
        missing: the other side says that there is no such file.
        denied: it says that one may not read it.
    """

    def __init__(
        self, address: str, reason: str, *, missing: bool = False, denied: bool = False
    ) -> None:
        super().__init__(f"{shown(address)}: {reason}")
        self.reason = reason
        self.missing = missing
        self.denied = denied


class StoppedError(Exception):
    """Nobody waits for the file any more; see `stop_with`."""


def shown(text: str) -> str:
    """`text` without passwords and queries of the addresses in it: presigned ones carry keys."""
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


def persistently(address: str, attempt: Callable[[], T]) -> T:
    """`attempt`'s result; what fails and might not fail again is tried again, after a pause.

    Raises:
        RemoteError: the last attempt's failure.
        ImportError, ValueError: see `open_filesystem`; or the disk of the cache is full.
    """
    open_filesystem(address)  # what cannot be mended by another attempt
    retries = settings().retries
    for number in range(retries + 1):
        try:
            return attempt()
        except StoppedError:
            raise
        except Exception as error:  # each file system raises its library's
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"the disk of {settings().cache_dir} is full: set data.cache_dir to another "
                    "place, or data.cache_gigabytes to less"
                ) from None
            failure, lasting = _failure(address, error)
            if lasting or number == retries:
                raise failure from None
        seconds = min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE) * random.uniform(0.5, 1)
        logger.warning(
            "%s (attempt %d of %d; the next in %.1f s)", failure, number + 1, retries + 1, seconds
        )
        pause(seconds)
    raise AssertionError("the last attempt returns or raises")


def _failure(address: str, error: Exception) -> tuple[RemoteError, bool]:
    """What to say of `error`, and whether the next attempt would meet it as well."""
    if isinstance(error, RemoteError):
        return error, False
    status = next(
        (n for k in ("status", "code", "status_code") if type(n := getattr(error, k, None)) is int),
        0,
    )
    missing = isinstance(error, FileNotFoundError) or status in (404, 410)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    refused = 400 <= status < 500 and status not in (408, 425, 429)
    reason = "there is no such file" if missing else f"{type(error).__name__}: {error}"
    failure = RemoteError(address, shown(reason), missing=missing, denied=denied)
    senseless = isinstance(error, (NotImplementedError, TypeError))
    return failure, missing or denied or refused or senseless


def once(
    address: str, method: str, *args: Any, progress: Callable[[], int] = int, **options: Any
) -> Any:
    """What fsspec's `method` gives for `address` and `args`.

    Args:
        progress: a number that grows while the call gets on.

    Raises:
        TimeoutError: it did not, for as long as `RemoteSettings.timeout_seconds`.
        StoppedError: see `stop_with`.
        Exception: the file system's.
    """
    filesystem, path = open_filesystem(address)
    timeout = settings().timeout_seconds
    if method == "get_file" and protocol_of(address) in HTTP:
        import aiohttp  # which is there: fsspec's http is made of it

        # Its own limit would be five minutes for the whole file, however large.
        options["timeout"] = aiohttp.ClientTimeout(total=None)
    call = _begin(filesystem, method, (path, *args), options)
    reached, since = progress(), time.monotonic()
    try:
        while not wait([call], min(0.25, timeout / 4)).done:
            pause(0)
            now = progress()
            if now != reached:
                reached, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                raise TimeoutError(f"nothing came for {timeout:g} s")
        return call.result()
    except FileNotFoundError as error:
        # fsspec's http says so of every failure, and in the cause what it was.
        if protocol_of(address) in HTTP and isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
    finally:
        call.cancel()


def _begin(
    filesystem: Any, method: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> Future[Any]:
    """The call under way. One of an asynchronous file system ends when it is cancelled; another's
    thread may go on, and nobody waits for it."""
    if filesystem.async_impl:
        coroutine = getattr(filesystem, f"_{method}")(*args, **options)
        return asyncio.run_coroutine_threadsafe(coroutine, filesystem.loop)
    call: Future[Any] = Future()
    call.set_running_or_notify_cancel()

    def work() -> None:
        try:
            call.set_result(getattr(filesystem, method)(*args, **options))
        except BaseException as error:
            call.set_exception(error)

    threading.Thread(target=work, name="fastclip-remote", daemon=True).start()
    return call


def open_filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system for `address`, and its path there.

    Raises:
        ImportError: a package is missing, which the message names.
        ValueError: fsspec does not know the protocol.
    """
    from fsspec.core import url_to_fs  # here, as local shards do without its 60 ms

    protocol = protocol_of(address)
    try:
        return url_to_fs(address)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        how = f"pip install {missing.partition('.')[0]}" if missing else str(error)
        raise ImportError(f"{shown(address)}: {protocol}:// needs another package: {how}") from None
    except ValueError as error:
        if "not known" not in str(error):
            raise ValueError(f"{shown(address)}: {shown(str(error))}") from None
        raise ValueError(
            f"{shown(address)}: fsspec knows no {protocol}://; it knows s3, gs, abfs, http, https, "
            "hf, sftp and others"
        ) from None


def protocol_of(address: str) -> str:
    """What stands before the ``://``."""
    return address.partition("://")[0]


_THREAD = threading.local()


def stop_with(stop: threading.Event) -> None:
    """Let `stop` end this thread's waiting for remote files: `StoppedError` is raised then."""
    _THREAD.stop = stop


def pause(seconds: float) -> None:
    """Sleep. Raises StoppedError when that was asked for."""
    stop: threading.Event | None = getattr(_THREAD, "stop", None)
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise StoppedError
