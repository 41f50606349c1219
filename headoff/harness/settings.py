"""What the suites are run on: the patch, the model, the device, and all else that can be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from headoff.devices import DTYPES, torch_dtype
from headoff.errors import SettingError


@dataclass(frozen=True)
class Settings:
    """What was chosen.

    - `attention`: what is under test, as `headoff.attention.resolve_attention` takes it
    - `model`: as `headoff.load` takes it
    - `images`: paths; none for the bundled scenes
    - `device`, `dtype`: the patch runs on and in these
    - `golden_dir`: golden files of a user's own; None for those of the suites
    - `failures`: folder for pictures of what went wrong
    - `seed`: of the random inputs
    - `baseline`: the attention that times are compared with
    - `max_slowdown`: the ratio of times from which the patch counts as slower
    """

    attention: str = "sdpa"
    model: str = "scenes"
    images: tuple[Path, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    golden_dir: Path | None = None
    failures: Path = Path("headoff-failures")
    seed: int = 0
    baseline: str = "sdpa"
    max_slowdown: float = 1.10

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype {self.dtype!r} is not known: use one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)
