"""Average precision (COCO's definition) on held-out scenes under every configuration, as model cards have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.evaluation import run
from headoff.evaluation.engines import LocalEngine
from headoff.evaluation.scores import score
from headoff.gates import Configuration, cumulative
from headoff.wording import markdown_table


@dataclass(frozen=True)
class Precision:
    """Average precision under one configuration, 0..1, and detections per scene at confidence 0.5."""

    configuration: str
    ap: float
    ap50: float
    ap75: float
    detections_per_scene: float


def evaluate(
    detector: Detector,
    *,
    count: int = 1000,
    first_seed: int = 0,
    configurations: Iterable[Configuration] | None = None,
    batch: int = 16,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Precision, ...]:
    """AP of `detector` on `count` held-out scenes, one `Precision` per configuration (the cumulative sweep).

    It is `headoff.evaluate` of `scenes:COUNT:FIRST`, of which nothing is kept.

    Args:
        progress: called with (finished scenes, scenes) after every batch.

    Raises:
        SettingError: the detector has other classes, `count` is below 1, or pyarrow or scipy is not installed.
    """
    if count < 1:
        raise SettingError(f"{count} scenes cannot be evaluated; give 1 or more")
    chosen = tuple(configurations) if configurations is not None else cumulative(detector.head_layout.heads)
    with TemporaryDirectory() as folder:
        results = run.evaluate(
            detector,
            f"scenes:{count}:{first_seed}",
            configurations=chosen,
            out=folder,
            batch=batch,
            engine=LocalEngine(0),
            progress=progress,
        )
        # Nothing off is always evaluated, asked for or not.
        scores = score(results, configurations=[*map(results.configurations.index, chosen)], resamples=0)
    return tuple(
        Precision(one.name, found["AP"], found["AP50"], found["AP75"], found.detections)
        for one, found in zip(chosen, scores.configurations, strict=True)
    )


def table(precisions: Sequence[Precision]) -> str:
    """The figures as a Markdown table."""
    rows = (
        (p.configuration, f"{p.ap:.3f}", f"{p.ap50:.3f}", f"{p.ap75:.3f}", f"{p.detections_per_scene:.1f}")
        for p in precisions
    )
    head = ("heads off", "AP", "AP50", "AP75", "detections per scene")
    return "\n".join(markdown_table(head, rows, padded=False))
