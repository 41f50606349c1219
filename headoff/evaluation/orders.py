"""Orders of heads by importance, along which cumulative sweeps over a data set switch them off.

An order is measured once, over a sample of the images or, better, by `headoff heads` over others. importance.json in
the folder of results has it, so that a run that goes on and all shards of a run switch heads off in the same order.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headoff.ablation import References
from headoff.ablation.kinds import references_for
from headoff.ablation.references import hash_of_image
from headoff.choices import VALUES, AblationKind, Site
from headoff.detector import Detector
from headoff.errors import ImageError, SettingError, error_line
from headoff.evaluation.manifest import MANIFEST
from headoff.evaluation.run import DataSet
from headoff.files import write_new_file
from headoff.gates import order_by_score
from headoff.importance import HeadImportance, aggregate, heads
from headoff.importance.result import Key
from headoff.values import resolve_value
from headoff.wording import counted

First = Literal["least", "most"]

FILE = "importance.json"
STORE = "importance"
"""A folder in that of results, with the values of coalitions in the images of a sample."""
MEASURE = "shapley_columns"
VALUE = "found"
"""The probability of the object's class times the IoU of the best box: AP is of boxes, too. On scenes an order by
probability alone switches a head off third that places boxes, and AP falls from 0.82 to 0.20 (docs/evaluate.md)."""
KNOWN = (VALUE, "AP")
"""Values whose Shapley values make an order by default, the first that a folder has: of `headoff heads`, of `headoff
evaluate`."""
IMAGES = 32
"""Images of a sample by default."""


@dataclass(frozen=True)
class ImportanceOrder:
    """An order by Shapley values of the H heads of a site, each in all layers: means over images, with 95% intervals.

    Attributes:
        first: the heads that go off first, the least or the most important ones.
        site: where the heads are.
        ablation: what heads that are off contribute.
        value: what is measured: a name in `headoff.choices.VALUES`, or AP.
        scores, low, high: of each head; no intervals (NaN) of one image.
        images: how many images they are means of.
        folder: that they were read from; empty where they were measured on a sample of the data set.
        sample: names of the images of that sample.
        confidence: of the detections in it.
    """

    first: First
    site: Site
    ablation: AblationKind
    value: str
    scores: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    images: int
    folder: str = ""
    sample: tuple[str, ...] = ()
    confidence: float | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads as they go off; those of equal scores by their number."""
        return order_by_score(self.scores, descending=self.first == "most")  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON types; None for NaN, which JSON does not have."""
        contents = {**asdict(self), "heads": self.heads}
        for end in ("low", "high"):
            contents[end] = [None if np.isnan(value) else value for value in contents[end]]
        return contents

    @classmethod
    def of(cls, contents: Mapping[str, Any]) -> ImportanceOrder:
        """Of `as_dict`. Raises KeyError, TypeError or ValueError where it is not that."""
        low, high = (
            tuple(np.nan if value is None else float(value) for value in contents[end])
            for end in ("low", "high")
        )
        return cls(
            contents["first"],
            contents["site"],
            contents["ablation"],
            contents["value"],
            tuple(map(float, contents["scores"])),
            low,
            high,
            int(contents["images"]),
            contents["folder"],
            tuple(contents["sample"]),
            contents["confidence"],
        )

    def describe(self) -> str:
        """The order, what was measured, and on what."""
        what = resolve_value(self.value).title if self.value in VALUES else "average precision"
        text = (
            f"Heads of {self.site} go off in the order {', '.join(map(str, self.heads))}, the {self.first} important "
            f"first. Importance is a head's Shapley value, in all layers, for {self.value} ({what}), over "
        )
        if self.folder:
            return f"{text}{counted(self.images, 'image')}, of {self.folder!r}."
        return (
            f"{text}a sample of {counted(self.images, 'image')} of those that are judged. That favours the order: for "
            "one that was not chosen by these images, measure it on others (headoff heads) and give --importance."
        )


def measured_order(
    detector: Detector,
    data: DataSet,
    site: Site,
    first: First,
    *,
    images: int = IMAGES,
    value: str = VALUE,
    ablation: AblationKind = "zero",
    references: References | str | Path | None = None,
    confidence: float = 0.5,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ImportanceOrder:
    """The order of the heads of a site, by a sample of the images of a data set.

    Args:
        detector: see `headoff.load`.
        data: see `headoff.evaluation.run.open_data_set`.
        site: where the heads are.
        first: the heads that go off first.
        images: how many are drawn, at random but always the same for a `seed`; those that cannot be read are left out.
        value: what is measured, see `headoff.values`.
        ablation, references: what heads that are off contribute, see `headoff.sweep`.
        confidence: of the detections with nothing off, whose probabilities are measured.
        seed: of the sample.
        store: a folder of values of coalitions, from which an interrupted call goes on.
        progress: called with (images done, images of the sample).

    Raises:
        SettingError: `images` is below 1, or nothing is detected in any of them.
        GateError: the detector has no such attention.
    """
    if images < 1:
        raise SettingError(f"importance cannot be measured on {images} images: give 1 or more")
    chosen = sorted(np.random.default_rng(seed).permutation(len(data.truth))[:images].tolist())
    fitted = references_for(ablation, detector, references).images if ablation == "optimal" else ()
    found: list[HeadImportance] = []
    names = []
    for done, index in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        try:
            picture, _ = data.source.load(index)
        except ImageError:
            continue
        if fitted and hash_of_image(picture) in fitted:
            continue
        one = heads(
            detector,
            picture,
            site=site,
            measures=MEASURE,
            values=value,
            ablations=ablation,
            references=references,
            confidence=confidence,
            store=None if store is None else Path(store) / f"{site} {index:06}",
        )
        if len(one.objects):
            found.append(one)
            names.append(data.truth.names[index])
    if progress is not None:
        progress(len(chosen), len(chosen))
    if not found:
        raise SettingError(
            f"nothing is detected in any of {counted(len(chosen), 'image')}, so heads have no importance there: draw "
            "more of them, or name a folder of `headoff heads`"
        )
    mean = aggregate(found).scores[Key(ablation, MEASURE, value)]
    scores, low, high = (tuple(row[0].tolist()) for row in (mean.scores, mean.low, mean.high))
    return ImportanceOrder(
        first,
        site,
        ablation,
        value,
        scores,
        low,
        high,
        len(found),
        sample=tuple(names),
        confidence=confidence,
    )


def read_order(
    folder: str | Path,
    site: Site,
    first: First,
    ablation: AblationKind = "zero",
    value: str | None = None,
) -> ImportanceOrder:
    """The order of the heads of a site, by the results of `headoff heads` or `headoff evaluate --set subsets`.

    Args:
        folder: it has heads.csv, of one image or of several.
        site: where the heads are.
        first: the heads that go off first.
        ablation: what heads that are off contribute.
        value: what was measured; by default the first of `KNOWN` that the folder has.

    Raises:
        SettingError: there is no heads.csv, or it lacks Shapley values of heads in all layers of the site under the
            ablation, by that value.
    """
    path = Path(folder) / "heads.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        has = sorted({(row["site"], row["ablation"], row["measure"], row["value"]) for row in rows})
        wants = KNOWN if value is None else (value,)
        value = next((one for one in wants if (site, ablation, MEASURE, one) in has), None)
        if value is None:
            listed = "; ".join(" ".join(one) for one in has[:6]) + ("; ..." if len(has) > 6 else "")
            raise SettingError(
                f"{str(path)!r} has no Shapley values of {' or '.join(wants)} of {site} under {ablation} ablation (it "
                f"has {listed or 'none'}): make them by `headoff heads --measure {MEASURE} --value {wants[0]} --site "
                f"{site} --ablate {ablation}`"
            )
        wanted = [
            row
            for row in rows
            if (row["site"], row["ablation"], row["measure"], row["value"])
            == (site, ablation, MEASURE, value)
        ]
        count = 1 + max(int(row["head"]) for row in wanted)
        by_head = [[row for row in wanted if int(row["head"]) == head] for head in range(count)]
        if not all(by_head):
            raise ValueError("scores of some heads are missing")
        # Of one image there is a row for each object.
        scores = tuple(float(np.mean([float(row["score"]) for row in some])) for some in by_head)
        low, high = (tuple(float(some[0].get(end) or "nan") for some in by_head) for end in ("low", "high"))
        images = int(wanted[0].get("images") or 1)
    except SettingError:
        raise
    except FileNotFoundError:
        raise SettingError(
            f"there is no heads.csv in {str(folder)!r}: name a results folder of `headoff heads`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise SettingError(
            f"{str(path)!r} is no table of `headoff heads` ({error_line(error)}): score the heads again"
        ) from error
    return ImportanceOrder(first, site, ablation, value, scores, low, high, images, folder=str(folder))


def bound_orders(
    folder: Path, about: Mapping[str, Any], measure: Callable[[], Sequence[ImportanceOrder]]
) -> tuple[ImportanceOrder, ...]:
    """The orders that a folder of results is bound to, which are measured where it has none yet.

    Of several processes that measure at the same time, all get what the first one has written.

    Args:
        folder: of the results.
        about: what is to be measured, of JSON types.
        measure: measures it.

    Raises:
        SettingError: the folder has orders that were measured otherwise.
        OutputError: the folder cannot be written.
    """
    path = folder / FILE
    if not path.exists() and (folder / MANIFEST).exists():
        raise SettingError(
            f"{str(folder)!r} has the results of another run, whose heads go off in another order than by importance: "
            "name another folder, or give the options of that run"
        )
    if not path.exists():
        contents = {"about": dict(about), "orders": [one.as_dict() for one in measure()]}
        write_new_file(path, json.dumps(contents, indent=1, allow_nan=False) + "\n")
    found, orders = _read(path)
    if found != json.loads(json.dumps(about)):
        different = [key for key in {**found, **about} if found.get(key) != about.get(key)]
        listed = "; ".join(f"{key} was {found.get(key)} and is {about.get(key)}" for key in different)
        raise SettingError(
            f"{str(folder)!r} has an order of heads that was measured otherwise: {listed}. Name another folder, or "
            "give the options of that run"
        )
    return orders


def orders_in(folder: Path) -> tuple[ImportanceOrder, ...]:
    """The orders by importance that a folder of results has; none for others. Raises SettingError."""
    return _read(folder / FILE)[1] if (folder / FILE).exists() else ()


def _read(path: Path) -> tuple[dict[str, Any], tuple[ImportanceOrder, ...]]:
    try:
        contents = json.loads(path.read_text())
        return dict(contents["about"]), tuple(map(ImportanceOrder.of, contents["orders"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{str(path)!r} cannot be read ({error_line(error)}): evaluate again, into another folder"
        ) from error
