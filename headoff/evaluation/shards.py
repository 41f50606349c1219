"""Files of the detections of one batch of images under all configurations, in Parquet.

Each is whole or absent. Its metadata names its images, and those that were left out, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headoff.errors import SettingError
from headoff.files import output_errors, write_file

if TYPE_CHECKING:
    import pyarrow

FOLDER = "detections"
KEY = b"headoff"
ROWS = 2**15
"""About how many rows a row group has: of a whole number of configurations, which are read together."""
BOX = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Shard:
    """A batch that was computed.

    Attributes:
        number: of the batch.
        images: indices of the images that have detections.
        skipped: why others were left out.
        digests: hash of each image that has detections.
        configurations_at_once: consecutive configurations in a row group.
        detections: of an image under a configuration.
    """

    number: int
    images: Sequence[int]
    skipped: Mapping[int, str]
    digests: Sequence[str]
    configurations_at_once: int
    detections: int

    @property
    def name(self) -> str:
        return f"batch-{self.number:06}.parquet"


def pyarrow_parquet() -> Any:
    """The module. Raises SettingError where pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SettingError("detections are stored by pyarrow: pip install 'headoff[evaluate]'") from error
    return pyarrow.parquet


def write_shard(
    folder: Path, shard: Shard, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, queries: np.ndarray
) -> None:
    """Write the detections of a batch, completely or not at all.

    Args:
        folder: of the results.
        shard: what they are of.
        scores: (C, B, n) float32.
        labels, queries: (C, B, n).
        boxes: (C, B, n, 4) float32.

    Raises:
        OutputError: it cannot be written.
    """
    parquet = pyarrow_parquet()
    import pyarrow

    configurations, images, n = scores.shape
    group = shard.configurations_at_once * images * n
    about = {
        "images": list(map(int, shard.images)),
        "skipped": {str(index): reason for index, reason in shard.skipped.items()},
        "digests": list(shard.digests),
        "configurations_at_once": shard.configurations_at_once,
        "detections": shard.detections,
    }
    columns = {
        "image": np.broadcast_to(np.array(shard.images, np.int32)[None, :, None], scores.shape),
        "configuration": np.broadcast_to(
            np.arange(configurations, dtype=np.int16)[:, None, None], scores.shape
        ),
        "query": queries.astype(np.int32),
        "label": labels.astype(np.int32),
        "score": scores,
        **{side: boxes[..., column] for column, side in enumerate(BOX)},
    }
    table = pyarrow.table(
        {name: np.ascontiguousarray(values).reshape(-1) for name, values in columns.items()}
    )
    table = table.replace_schema_metadata({KEY: json.dumps(about)})
    sink = pyarrow.BufferOutputStream()
    floats = ["score", *BOX]
    parquet.write_table(
        table,
        sink,
        row_group_size=max(1, group),
        compression="zstd",
        compression_level=1,
        use_dictionary=["image", "configuration", "query", "label"],
        use_byte_stream_split=floats,
        write_statistics=False,
    )
    write_file(folder / FOLDER / shard.name, sink.getvalue())


def read_shards(folder: Path) -> Iterator[Shard]:
    """What the files in a folder of results hold, by number. A file that is damaged is left out."""
    parquet = pyarrow_parquet()
    import pyarrow

    with output_errors(folder):
        paths = sorted((folder / FOLDER).glob("batch-*.parquet"))
    for path in paths:
        try:
            about = json.loads(parquet.read_schema(path).metadata[KEY])
            yield Shard(
                int(path.stem.removeprefix("batch-")),
                tuple(about["images"]),
                {int(index): str(reason) for index, reason in about["skipped"].items()},
                tuple(about["digests"]),
                int(about["configurations_at_once"]),
                int(about["detections"]),
            )
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
            continue


def read_rows(folder: Path, shard: Shard, first: int, last: int) -> pyarrow.Table:
    """The rows of the configurations `first` to `last`, and perhaps others.

    Raises:
        SettingError: the file has been damaged or removed.
    """
    parquet = pyarrow_parquet()
    import pyarrow

    path = folder / FOLDER / shard.name
    try:
        with parquet.ParquetFile(path) as file:
            groups = range(first // shard.configurations_at_once, last // shard.configurations_at_once + 1)
            return file.read_row_groups(list(groups), use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise SettingError(
            f"{str(path)!r} cannot be read any more ({error}): remove it, and run the same evaluation again"
        ) from error
