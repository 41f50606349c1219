"""What a report draws: its page, and figures for papers."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from headoff.choices import FIGURE_FORMATS, FIGURES, FigureFormat, Figures
from headoff.errors import SettingError
from headoff.figures.canvas import DPI

MOST_DPI = 1200


@dataclass(frozen=True)
class Drawing:
    """What is drawn besides numbers.

    Attributes:
        figures: `none`: nothing; `page`: index.html; `all`: also a file for every figure.
        format: of the files of figures.
        dpi: pixels an inch, of PNG files and of the images within SVG and PDF files.

    Raises:
        SettingError: there is no such choice.
    """

    figures: Figures = "page"
    format: FigureFormat = "png"
    dpi: int = DPI

    def __post_init__(self) -> None:
        for value, choices, what in (
            (self.figures, FIGURES, "figures"),
            (self.format, FIGURE_FORMATS, "format"),
        ):
            if value not in choices:
                raise SettingError(f"{what} cannot be {value!r}: use one of {', '.join(choices)}")
        if not 1 <= self.dpi <= MOST_DPI:
            raise SettingError(f"figures cannot have {self.dpi} dpi: give 1 to {MOST_DPI}")

    def describe(self) -> dict[str, str]:
        """As part of a report's provenance."""
        files = f", {self.format}, {self.dpi} dpi" if self.figures == "all" else ""
        return {"figures": f"{self.figures}{files}"}

    def save(self, figure: Figure, file: object) -> None:
        """Write a figure. Equal figures make equal files."""
        options: dict[str, object] = {
            # Level 3 takes half the time of the default 6, and a few per cent more space.
            "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
            "svg": {"metadata": {"Date": None}},
            "pdf": {"metadata": {"CreationDate": None}},
        }[self.format]  # type: ignore[assignment]
        figure.savefig(file, format=self.format, dpi=self.dpi, **options)  # type: ignore[arg-type]
