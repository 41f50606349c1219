"""`headoff scenes`: draw the procedural scenes, train the bundled model on them, evaluate it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headoff.cli.options import add_detector_options, add_out_option, named_path, positive, whole
from headoff.errors import SettingError
from headoff.files import output_errors

SIZE = 192

_RECIPES = {
    "detr": ("headoff.scenes.detr_training", "DetrRecipe", "SCENES_CONFIG"),
    "deformable": ("headoff.scenes.deformable_training", "DeformableRecipe", "SCENES_DEFORMABLE_CONFIG"),
}
"""Module, recipe and configuration of the models that can be trained; imported when they are."""


def hours(text: str) -> float:
    """A positive number of hours, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours above 0")
    return value


def add_parser(commands: Any) -> None:
    """Add the command with its actions."""
    parser = commands.add_parser(
        "scenes",
        help="draw the procedural scenes, train and evaluate the bundled model",
        description="The procedural data set of the bundled model: shapes over textured backgrounds.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    draw = actions.add_parser("draw", help="draw scenes with their true boxes (PNG and COCO JSON)")
    draw.add_argument("--count", type=positive, default=12, help="number of scenes (default 12)")
    draw.add_argument("--first-seed", type=whole, default=0, help="seed of the first scene (default 0)")
    draw.add_argument("--size", type=positive, default=SIZE, help=f"side in pixels (default {SIZE})")
    draw.add_argument("--split", choices=("held_out", "train"), default="held_out")
    add_out_option(draw, "headoff-scenes")
    draw.set_defaults(run=run_draw)

    train = actions.add_parser(
        "train",
        help="train a bundled model from scratch",
        description="Train a bundled model from scratch. An interrupted run continues where it stopped if it is "
        "started again with the same folder and recipe. The DETR takes about 85 minutes on 2 CPU cores with AMX, "
        "the RT-DETR as long as --hours says.",
    )
    train.add_argument(
        "--model",
        choices=tuple(_RECIPES),
        default="detr",
        help="detr: the model `scenes` (default); deformable: the RT-DETR `scenes-deformable`, which needs "
        "transformers (pip install 'headoff[family]')",
    )
    train.add_argument(
        "--out",
        type=named_path,
        default=Path("headoff-training"),
        help="folder of the run (default headoff-training)",
    )
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="optimiser steps (default: the recipe's)")
    length.add_argument(
        "--hours",
        type=hours,
        help="hours of training instead of steps, for --model deformable: the learning rate follows the time, so that "
        "the run is complete at its end however busy the machine is. A run can be continued with more hours",
    )
    train.add_argument("--batch", type=positive, help="images per step (default: the recipe's)")
    train.add_argument(
        "--pool", type=positive, help="scenes drawn in advance per size (default: the recipe's)"
    )
    train.add_argument("--seed", type=whole, default=0, help="random seed (default 0)")
    train.add_argument(
        "--workers", type=positive, help="processes, each with one thread (default: one per core)"
    )
    train.set_defaults(run=run_train)

    evaluate = actions.add_parser(
        "evaluate",
        help="average precision of a model on held-out scenes, for every k of the cumulative sweep",
        description="Average precision (COCO's definition) on held-out scenes for none off, first 1 off, ... "
        "all heads off. With the defaults it reproduces the figures of the model card.",
    )
    evaluate.add_argument("--count", type=positive, default=1000, help="held-out scenes (default 1000)")
    evaluate.add_argument("--first-seed", type=whole, default=0, help="seed of the first scene (default 0)")
    evaluate.add_argument(
        "--json", type=named_path, metavar="FILE", help="also write the figures to this file"
    )
    add_detector_options(evaluate)
    evaluate.set_defaults(run=run_evaluate)


def run_draw(settings: argparse.Namespace) -> int:
    """Run `headoff scenes draw`."""
    from headoff.scenes.held_out import LARGEST_SIDE

    if settings.size > LARGEST_SIDE:
        raise SettingError(
            f"--size {settings.size} is too large: give a side of at most {LARGEST_SIDE} pixels"
        )
    if settings.size < 16:
        raise SettingError(f"a scene of {settings.size} pixels is too small to draw; use --size 16 or more")
    _check_folder(settings.out)
    from tqdm import tqdm

    from headoff.scenes.samples import write_scenes

    seeds = range(settings.first_seed, settings.first_seed + settings.count)
    paths = write_scenes(
        settings.out, tqdm(seeds, desc="drawing", unit="scene"), settings.size, settings.split
    )
    print(f"{len(paths)} scenes and annotations.json are in {settings.out}")
    return 0


def _check_folder(folder: Path) -> None:
    """Raises OutputError where it cannot be made."""
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def run_train(settings: argparse.Namespace) -> int:
    """Run `headoff scenes train`."""
    from dataclasses import replace
    from importlib import import_module

    module_name, recipe_name, config_name = _RECIPES[settings.model]
    try:
        module = import_module(module_name)
        from headoff.scenes.training import train
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        extra = "family" if package == "transformers" else "scenes"
        raise SettingError(f"training needs {package}: pip install 'headoff[{extra}]'") from error
    recipe, config = getattr(module, recipe_name)(seed=settings.seed), getattr(module, config_name)
    if settings.hours and recipe.steps:
        raise SettingError("this model is trained by steps; give --steps instead of --hours")
    _check_folder(settings.out)
    chosen = {
        name: value for name in ("steps", "hours", "batch", "pool") if (value := getattr(settings, name))
    }
    if settings.steps:
        chosen["hours"] = 0.0
    weights = train(settings.out, replace(recipe, **chosen), config, workers=settings.workers)
    print(f"the weights are in {weights}; evaluate them with: headoff scenes evaluate --model {weights}")
    return 0


def run_evaluate(settings: argparse.Namespace) -> int:
    """Run `headoff scenes evaluate`."""
    import json
    from dataclasses import asdict

    from headoff.cli.detectors import load_detector
    from headoff.cli.progress import progress_bar
    from headoff.evaluation.scenes import evaluate, table
    from headoff.files import write_file

    detector = load_detector(settings)
    with progress_bar("evaluating", "scene") as update:
        precisions = evaluate(detector, count=settings.count, first_seed=settings.first_seed, progress=update)
    print(table(precisions))
    if settings.json:
        write_file(settings.json, json.dumps([asdict(p) for p in precisions], indent=1) + "\n")
    return 0
