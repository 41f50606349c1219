"""Download one file, with a progress bar and a hash check."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from headoff.errors import DownloadError, error_line
from headoff.files import atomic_write

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_NOT_FOUND = (404, 410)


class NotOnServer(DownloadError):
    """The server answered, and has no such file."""


def download(url: str, target: Path, *, sha256_prefix: str | None = None) -> Path:
    """Download `url` to `target`, unless `target` exists and has the right hash. Returns `target`.

    `target` is written completely or not at all, and no temporary file is left after an error or Ctrl-C. The
    progress bar goes to stderr if that is a terminal.

    Raises:
        NotOnServer: the server has no such file.
        DownloadError: the server cannot be reached, the transfer is cut short, the SHA-256 does not begin with
            `sha256_prefix`, or the file cannot be written.
    """
    if target.is_file() and (sha256_prefix is None or _sha256(target).startswith(sha256_prefix)):
        return target
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "headoff"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            _receive(response, url, target, sha256_prefix)
    except urllib.error.HTTPError as error:
        kind = NotOnServer if error.code in _NOT_FOUND else DownloadError
        raise kind(f"{url} cannot be downloaded (the server answered {error.code} {error.reason}); "
                   f"{_by_hand(url, target)}") from error  # fmt: skip
    except (
        urllib.error.URLError,
        TimeoutError,
        ConnectionError,
        ValueError,
        http.client.HTTPException,
    ) as error:
        raise DownloadError(
            f"{url} cannot be reached ({_reason(error)}), and there is no copy in the cache; "
            f"connect to the internet, or {_by_hand(url, target)}"
        ) from error
    except OSError as error:
        raise DownloadError(
            f"{url} cannot be saved to {str(target)!r} ({error_line(error)}); "
            "check the folder and the free space, or set HEADOFF_CACHE to another folder"
        ) from error
    return target


def _receive(response: http.client.HTTPResponse, url: str, target: Path, sha256_prefix: str | None) -> None:
    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() else None
    digest = hashlib.sha256()
    received = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(target) as file,
        tqdm(
            total=expected, desc=target.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar,
    ):
        for piece in _pieces(response, url):
            file.write(piece)
            digest.update(piece)
            received += len(piece)
            bar.update(len(piece))
        # Read in pieces, http.client reports a body that is cut short as complete.
        if expected is not None and received != expected:
            raise DownloadError(
                f"the download of {url} stopped after {received} of {expected} bytes and was removed; "
                "try again"
            )
        if sha256_prefix is not None and not digest.hexdigest().startswith(sha256_prefix):
            raise DownloadError(
                f"{url} has SHA-256 {digest.hexdigest()} where {sha256_prefix}... was expected; "
                "it was removed, try again, and if that does not help, do not trust that server"
            )


def _pieces(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    # Separate from the writing, so that a broken connection is not reported as a full disk.
    try:
        while piece := response.read(_CHUNK):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"the download of {url} broke off ({_reason(error)}) and was removed; try again"
        ) from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error  # urllib wraps the exception that says what happened
    return error_line(reason) if isinstance(reason, Exception) else str(reason)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(url: str, target: Path) -> str:
    return f"download it elsewhere and put it at {str(target)!r}"
