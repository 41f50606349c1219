"""One file from the web: with a progress bar, checked, and either whole in its place or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from headoff.errors import DownloadError
from headoff.files import written_atomically

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_NOT_FOUND = (404, 410)


class NotOnServer(DownloadError):
    """The server is there and says that the file is not."""


def download(url: str, target: Path, *, sha256_prefix: str | None = None) -> Path:
    """Make sure that `target` holds the file at `url`, and return it.

    A file that is there already is kept, unless its hash is wrong; then it is replaced. The bar goes to
    stderr, where that is a terminal. Nothing half-written is ever at `target`, and nothing is left beside it
    after an error or Ctrl-C.

    Raises DownloadError where the server cannot be reached, the transfer stops short, the SHA-256 does not
    begin with `sha256_prefix`, or the file cannot be written; NotOnServer where the server has no such file.
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
            f"{url} cannot be saved to {str(target)!r} ({error.strerror or error}); "
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
        written_atomically(target) as file,
        tqdm(
            total=expected, desc=target.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar,
    ):
        for piece in _pieces(response, url):
            file.write(piece)
            digest.update(piece)
            received += len(piece)
            bar.update(len(piece))
        # Asked for pieces, http.client takes a body that stops short for one that ends.
        if expected is not None and received != expected:
            raise DownloadError(
                f"the download of {url} stopped after {received} of {expected} bytes and was removed; "
                "try again"
            )
        if sha256_prefix is not None and not digest.hexdigest().startswith(sha256_prefix):
            raise DownloadError(
                f"{url} has SHA-256 {digest.hexdigest()} where {sha256_prefix}... was promised; "
                "it was removed, try again, and if that does not help, do not trust that server"
            )


def _pieces(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    # Apart from the writing, so that a broken connection is not taken for a full disk.
    try:
        while piece := response.read(_CHUNK):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"the download of {url} broke off ({_reason(error)}) and was removed; try again"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(url: str, target: Path) -> str:
    return f"download it elsewhere and put it at {str(target)!r}"
