"""The published DETR checkpoints: names, URLs and the download cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from headoff.detr.checkpoints.download import download

ORIGINALS_URL = "https://dl.fbaipublicfiles.com/detr"

# From the table in the README of facebookresearch/detr. A file name ends with the beginning of the file's SHA-256.
ORIGINALS = {
    "detr-resnet-50": "detr-r50-e632da11.pth",
    "detr-resnet-50-dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr-resnet-101": "detr-r101-2c7b67e5.pth",
    "detr-resnet-101-dc5": "detr-r101-dc5-a2e86def.pth",
}


def cache_folder() -> Path:
    """The folder of downloads: `$HEADOFF_CACHE`, or else that of `torch.hub`.

    torch.hub gives DETR's files the same names, so files that it downloaded are used.
    """
    chosen = os.environ.get("HEADOFF_CACHE")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir(), "checkpoints")


def published_checkpoint(name: str, *, url: str | None = None, folder: Path | None = None) -> Path:
    """The path of a published checkpoint, downloaded unless it is in the cache.

    Args:
        name: a key of `ORIGINALS`.
        url: the folder on the server; `ORIGINALS_URL` by default.
        folder: the cache; `cache_folder()` by default.

    Raises:
        DownloadError: the checkpoint cannot be downloaded.
    """
    file_name = ORIGINALS[name]
    target = (cache_folder() if folder is None else folder) / file_name
    return download(f"{url or ORIGINALS_URL}/{file_name}", target, sha256_prefix=hash_prefix(file_name))


def hash_prefix(file_name: str) -> str | None:
    """The beginning of the SHA-256 that a published file's name contains; None if it contains none."""
    found = re.search(r"-([0-9a-f]{8,})\.", file_name)
    return found[1] if found else None
