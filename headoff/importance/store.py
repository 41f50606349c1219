"""Values of coalitions in a file, so that an interrupted computation goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headoff.files import write_file

FORMAT = "headoff values 1"
SECONDS = 10.0
"""Between two writes."""


class ValueStore:
    """Values by coalition, in memory and in a safetensors file.

    A file that is damaged, or about something else than `about`, is replaced.

    Args:
        path: the file; it need not exist.
        about: all that values depend on, apart from the coalition.
    """

    def __init__(self, path: str | Path, about: Mapping[str, str]) -> None:
        self.path = Path(path)
        self._metadata = {"format": FORMAT, "about": json.dumps(dict(about), sort_keys=True)}
        self._values: dict[bytes, Tensor] = {}
        self._written = time.monotonic()
        self._read()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, coalitions: Tensor) -> list[Tensor | None]:
        """The values (V,) of each of `coalitions` (C, L, H), all values of all objects in one row; None if unknown."""
        return [self._values.get(key) for key in _keys(coalitions)]

    def add(self, coalitions: Tensor, values: Tensor) -> None:
        """Add values (C, V), and write the file if the last time was long ago.

        Raises:
            OutputError: the file cannot be written.
        """
        self._values.update(zip(_keys(coalitions), values.double().cpu(), strict=True))
        if time.monotonic() - self._written > SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, atomically.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._values:
            return
        tensors = {
            "coalitions": torch.tensor([list(key) for key in self._values], dtype=torch.uint8),
            "values": torch.stack(list(self._values.values())),
        }
        write_file(self.path, safetensors.torch.save(tensors, self._metadata))
        self._written = time.monotonic()

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                if file.metadata() != self._metadata:
                    return
                coalitions, values = file.get_tensor("coalitions"), file.get_tensor("values")
        except (OSError, SafetensorError):
            return
        self._values = {bytes(key): row for key, row in zip(coalitions.tolist(), values, strict=True)}


def _keys(coalitions: Tensor) -> list[bytes]:
    return [bytes(row) for row in coalitions.flatten(1).to(torch.uint8).tolist()]
