"""The published DETR checkpoints: their names, their addresses, and the folder that keeps downloads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from headoff.detr.checkpoints.download import download

ORIGINALS_URL = "https://dl.fbaipublicfiles.com/detr"

# From the table in the README of facebookresearch/detr. The end of each file name is the beginning of its
# SHA-256.
ORIGINALS = {
    "detr-resnet-50": "detr-r50-e632da11.pth",
    "detr-resnet-50-dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr-resnet-101": "detr-r101-2c7b67e5.pth",
    "detr-resnet-101-dc5": "detr-r101-dc5-a2e86def.pth",
}


def cache_folder() -> Path:
    """Where downloads are kept: `$HEADOFF_CACHE`, or else the folder of `torch.hub`.

    torch.hub names DETR's files alike, so whoever has run DETR from there has them already.
    """
    chosen = os.environ.get("HEADOFF_CACHE")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir(), "checkpoints")


def published_checkpoint(name: str, *, url: str | None = None, folder: Path | None = None) -> Path:
    """The file of a published checkpoint (a key of `ORIGINALS`), downloaded unless it is in the cache.

    `url` is the folder on the server, `ORIGINALS_URL` by default, and `folder` the cache. Raises
    DownloadError.
    """
    file_name = ORIGINALS[name]
    target = (cache_folder() if folder is None else folder) / file_name
    return download(f"{url or ORIGINALS_URL}/{file_name}", target, sha256_prefix=hash_prefix(file_name))


def hash_prefix(file_name: str) -> str | None:
    """The beginning of the SHA-256 in a published file's name; None where there is none."""
    found = re.search(r"-([0-9a-f]{8,})\.", file_name)
    return found[1] if found else None
