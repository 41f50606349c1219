"""The summary of a results folder: scores of all configurations, written as tables, figures and a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headoff.choices import FigureFormat, Figures
from headoff.errors import SettingError
from headoff.evaluation.manifest import relevance_identity
from headoff.evaluation.orders import orders_in
from headoff.evaluation.outcomes import CONFIDENCE
from headoff.evaluation.relevance import explained, faithfulness_statistics, relevance_statistics
from headoff.evaluation.results import Results
from headoff.evaluation.scores import RESAMPLES, score

if TYPE_CHECKING:
    from headoff.ablation import References
    from headoff.detector import Detector
    from headoff.report.worst_images import Pictures


def summarise(
    folder: str | Path,
    *,
    pictures: Pictures | None = None,
    out: str | Path | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    processes: int | None = None,
    figures: Figures = "page",
    format: FigureFormat = "png",
    dpi: int | None = None,
    progress: Callable[[int], object] | None = None,
    relevance: int = 0,
    detector: Detector | None = None,
    references: References | str | Path | None = None,
    relevance_progress: Callable[[int, int], object] | None = None,
    faithfulness: int = 0,
    faithfulness_progress: Callable[[int, int], object] | None = None,
    method: str = "chefer",
    relevance_of: str | int | None = None,
) -> Path:
    """Score all configurations of a results folder, and write what comes out; see docs/evaluate.md.

    There are index.html, summary.json (the last file, which is there when all are), configurations.csv, metrics.csv,
    classes.csv, outcomes.csv, rates.csv, heads.csv and contributions.parquet. One configuration's detections are in
    memory at a time.

    Args:
        folder: of `headoff evaluate`.
        pictures: the images, for thumbnails: the `source` of a `headoff.evaluation.run.DataSet`.
        out: where to write; by default in `folder`.
        resamples: samples of the bootstrap over images; 0 for no intervals.
        confidence: above which detections have outcomes.
        processes: that score configurations; by default as many as there are cores, if that is worth their start.
        figures, format, dpi: see `headoff.write_report`.
        progress: called with 1 after each configuration.
        detector: the one that was evaluated: the images in which most is lost have reports of their sweeps in sweeps/,
            which their thumbnails open.
        references: of the detector, where it was evaluated with some.
        relevance: explain the objects of so many images, for relevance.csv (`headoff.evaluation.relevance`); this needs
            `pictures` and the `detector`.
        faithfulness: measure deletion and insertion on so many images, for faithfulness.csv, likewise. Where heads that
            are off contribute something, only with nothing off.
        relevance_progress, faithfulness_progress: called with (images done, images of the sample), of faithfulness for
            all configurations together.
        method: of relevance.
        relevance_of: the configurations of relevance and faithfulness, see `headoff.evaluation.relevance.explained`.

    Returns:
        The path of the page, or of summary.json without one.

    Raises:
        SettingError: there are no results, or an argument is invalid.
        OutputError: a file cannot be written.
    """
    # Here, as a process that scores needs no matplotlib.
    from headoff.report.drawing import Drawing
    from headoff.report.evaluation import write_summary
    from headoff.report.output import write_report
    from headoff.report.worst_images import opened_with, sweep_command
    from headoff.sweeps import sweep

    drawing = Drawing(figures, format) if dpi is None else Drawing(figures, format, dpi)
    if (relevance or faithfulness) and (pictures is None or detector is None):
        raise SettingError("relevance needs the images and the detector: give pictures and detector")
    source = Results(folder)
    chosen = explained(source.configurations, relevance_of) if relevance or faithfulness else []
    scores = score(source, resamples=resamples, confidence=confidence, processes=processes, progress=progress)
    provenance = {str(name): str(value) for name, value in source.manifest["provenance"].items()}

    def command(image: int, configuration: int) -> str:
        name, text = source.truth.names[image], source.configurations[configuration].text
        return sweep_command(pictures, image, name, provenance.get("model", ""), text)

    ablation = source.manifest["identity"].get("ablation", "zero")
    statistics = faithful = None
    if relevance and pictures is not None and detector is not None:
        statistics = relevance_statistics(
            detector,
            pictures,
            source.done.tolist(),
            chosen,
            relevance,
            method=method,
            confidence=confidence,
            ablation=ablation,
            references=references,
            store=source.folder / "relevance",
            about=relevance_identity(source.manifest["identity"]),
            progress=relevance_progress,
        )
    if faithfulness and pictures is not None and detector is not None:
        faithful = faithfulness_statistics(
            detector,
            pictures,
            source.done.tolist(),
            chosen if ablation == "zero" else chosen[:1],
            faithfulness,
            method=method,
            confidence=confidence,
            store=source.folder / "faithfulness",
            progress=faithfulness_progress,
        )

    def open_sweep(image: int, configuration: int) -> Path:
        """The page of the sweep of an image, which is written."""
        place = Path(out or folder) / "sweeps" / str(source.truth.image_ids[image])
        assert pictures is not None and detector is not None
        picture, _ = pictures.load(image)
        result = sweep(
            detector,
            picture,
            [source.configurations[index] for index in opened_with(source.configurations, configuration)],
            confidence=confidence,
            ablation=ablation,
            references=references,
        )
        return write_report(
            place, picture, result, provenance={**provenance, "image": source.truth.names[image]}
        )

    return write_summary(
        Path(out or folder),
        source,
        scores,
        provenance=provenance,
        skipped=source.skipped,
        ablation=ablation,
        orders=orders_in(source.folder),
        relevance=statistics,
        faithfulness=faithful,
        pictures=pictures,
        command=command,
        open_sweep=open_sweep if pictures is not None and detector is not None else None,
        drawing=drawing,
    )
