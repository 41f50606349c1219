"""headoff: switch off attention heads of a DETR decoder and see which detections survive.

import headoff

detector = headoff.load("scenes")
result = headoff.sweep(detector, headoff.sample_image(0))
for configuration, outcome in zip(result.configurations, result.outcomes):
    print(configuration.name, outcome.counts)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headoff.attention import Attention, attention_names, register_attention
    from headoff.detections import Detection, Detections, detect
    from headoff.detr import Detector, DetectorOutput, DetrConfig, Memory
    from headoff.detr.checkpoints import load, save_native
    from headoff.detr.graphs import DecodeGraphs
    from headoff.effects import effect_on_detections, effect_on_maps
    from headoff.errors import (
        AttentionError,
        CheckpointError,
        DownloadError,
        GateError,
        HeadoffError,
        ImageError,
        NonFiniteError,
        OutputError,
        SettingError,
    )
    from headoff.figures import (
        MapStyle,
        plot_detections,
        plot_head_attention,
        plot_map,
        plot_outcomes,
        plot_relevance_grid,
        plot_survival,
    )
    from headoff.gates import (
        Configuration,
        Gates,
        HeadLayout,
        all_subsets,
        cumulative,
        first_off,
        heads_off,
        layers_off,
        none_off,
        off_matrix,
        off_vector,
        only_heads_on,
        order_by_score,
        random_order,
        single_heads,
        stack,
    )
    from headoff.images import Preprocessing, load_image, preprocess
    from headoff.notation import parse_configuration
    from headoff.outcomes import ConfigurationOutcome, Outcome, Status
    from headoff.relevance import Explanation, explain, load_explanation
    from headoff.scenes.samples import sample_image, sample_images
    from headoff.sweeps import SweepResult, sweep

__version__ = "0.1.0"

# Imported when first asked for: torch takes seconds, and the pytest plugin is loaded in every run of pytest wherever
# headoff is installed.
_NAMES = {
    "headoff.attention": ("Attention", "attention_names", "register_attention"),
    "headoff.detections": ("Detection", "Detections", "detect"),
    "headoff.detr": ("Detector", "DetectorOutput", "DetrConfig", "Memory"),
    "headoff.detr.checkpoints": ("load", "save_native"),
    "headoff.detr.graphs": ("DecodeGraphs",),
    "headoff.effects": ("effect_on_detections", "effect_on_maps"),
    "headoff.errors": (
        "AttentionError",
        "CheckpointError",
        "DownloadError",
        "GateError",
        "HeadoffError",
        "ImageError",
        "NonFiniteError",
        "OutputError",
        "SettingError",
    ),
    "headoff.figures": (
        "MapStyle",
        "plot_detections",
        "plot_head_attention",
        "plot_map",
        "plot_outcomes",
        "plot_relevance_grid",
        "plot_survival",
    ),
    "headoff.gates": (
        "Configuration",
        "Gates",
        "HeadLayout",
        "all_subsets",
        "cumulative",
        "first_off",
        "heads_off",
        "layers_off",
        "none_off",
        "off_matrix",
        "off_vector",
        "only_heads_on",
        "order_by_score",
        "random_order",
        "single_heads",
        "stack",
    ),
    "headoff.images": ("Preprocessing", "load_image", "preprocess"),
    "headoff.notation": ("parse_configuration",),
    "headoff.outcomes": ("ConfigurationOutcome", "Outcome", "Status"),
    "headoff.relevance": ("Explanation", "explain", "load_explanation"),
    "headoff.scenes.samples": ("sample_image", "sample_images"),
    "headoff.sweeps": ("SweepResult", "sweep"),
}

__all__ = [
    "Attention",
    "AttentionError",
    "CheckpointError",
    "Configuration",
    "ConfigurationOutcome",
    "DecodeGraphs",
    "Detection",
    "Detections",
    "Detector",
    "DetectorOutput",
    "DetrConfig",
    "DownloadError",
    "Explanation",
    "GateError",
    "Gates",
    "HeadLayout",
    "HeadoffError",
    "ImageError",
    "MapStyle",
    "Memory",
    "NonFiniteError",
    "Outcome",
    "OutputError",
    "Preprocessing",
    "SettingError",
    "Status",
    "SweepResult",
    "all_subsets",
    "attention_names",
    "cumulative",
    "detect",
    "effect_on_detections",
    "effect_on_maps",
    "explain",
    "first_off",
    "heads_off",
    "layers_off",
    "load",
    "load_explanation",
    "load_image",
    "none_off",
    "off_matrix",
    "off_vector",
    "only_heads_on",
    "order_by_score",
    "parse_configuration",
    "plot_detections",
    "plot_head_attention",
    "plot_map",
    "plot_outcomes",
    "plot_relevance_grid",
    "plot_survival",
    "preprocess",
    "random_order",
    "register_attention",
    "sample_image",
    "sample_images",
    "save_native",
    "single_heads",
    "stack",
    "sweep",
]

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
