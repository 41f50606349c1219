"""What results belong to. A folder has the results of one run, which can be continued but not mixed with another."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headoff import __version__
from headoff.attention import attention_label
from headoff.detector import Detector
from headoff.errors import SettingError, error_line
from headoff.evaluation.shards import FOLDER
from headoff.evaluation.tables import GroundTruth
from headoff.evaluation.work import Work
from headoff.files import output_errors, write_file, write_new_file

FORMAT = "headoff evaluation 1"
MANIFEST = "manifest.json"
TRUTH = "truth.npz"

COMPUTING = (
    "ablation", "attention", "deformable", "detr", "family", "gates",
    "boxes.py", "detector.py", "images.py", "scoring.py", "sweeps.py",
    "evaluation/batches.py", "evaluation/candidates.py", "evaluation/sources.py", "evaluation/work.py",
)  # fmt: skip
"""Parts of headoff that detections depend on."""


def identity(work: Work, detector: Detector, device: str, truth: GroundTruth) -> dict[str, Any]:
    """All that decides the detections, as JSON types: two runs with the same identity give the same files.

    Of what is long there are hashes. Where images are is not part of it: they may be moved.
    """
    cpu = {"threads": work.threads} if device == "cpu" else {}
    return {
        "format": FORMAT,
        "headoff": __version__,
        "code": _hash_of_code(),
        "torch": torch.__version__,
        **_version_of_transformers(detector),
        "weights": _hash_of_weights(detector),
        "heads": detector.head_layout.heads_text,
        "attention": attention_label(detector.attention),
        "attention code": _hash_of_source(detector.attention),
        "deformable attention code": _hash_of_source(detector.deformable_attention),
        "device": device,
        "dtype": str(detector.dtype).removeprefix("torch."),
        **cpu,
        "preprocessing": json.loads(json.dumps(asdict(work.preprocessing))),
        "scoring": asdict(detector.scoring),
        "images": len(truth),
        "annotations": _hash_of_arrays(truth),
        "batches": _hash(json.dumps(work.batches)),
        "configurations": [one.text for one in work.configurations],
        "ablation": work.ablation,
        "references": "" if work.references is None else _hash(json.dumps(work.references.images)),
        "memory budget": work.memory_budget,
    }


def relevance_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the relevance of an image, of an `identity`: not which others there are, nor what else is off."""
    others = ("images", "annotations", "batches", "configurations")
    kept = {name: value for name, value in identity.items() if name not in others}
    return {**kept, "relevance code": _hash_of_code(("relevance", "evaluation/relevance.py"))}


def bind(
    folder: Path,
    about: Mapping[str, Any],
    truth: GroundTruth,
    names: list[str],
    provenance: Mapping[str, str],
) -> None:
    """Write the manifest and the ground truth of a run, or check that those in the folder are of the same run.

    Args:
        folder: of the results.
        about: the run's `identity`.
        truth: is written as well.
        names: of the configurations.
        provenance: what reports say of the run; nothing depends on it.

    Raises:
        SettingError: the folder has results of another run; the message says what differs.
        OutputError: the folder cannot be written.
    """
    path = folder / MANIFEST
    if not path.exists():
        if _has_detections(folder):
            raise SettingError(
                f"{str(folder)!r} has detections, and no {MANIFEST} that says of what: name another folder"
            )
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {one.name: np.asarray(getattr(truth, one.name)) for one in fields(truth)}
        np.savez_compressed(buffer, **arrays)
        write_file(folder / TRUTH, buffer.getvalue())
        contents = {"identity": dict(about), "names": names, "provenance": dict(provenance)}
        write_new_file(path, json.dumps(contents, indent=1) + "\n")
    found = read_manifest(folder)["identity"]
    different = [key for key in {**found, **about} if found.get(key) != about.get(key)]
    if different:
        listed = "; ".join(f"{key} {_differs(found.get(key), about.get(key))}" for key in different[:4])
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise SettingError(
            f"{str(folder)!r} has the results of another run, with which these would be mixed: {listed}{more}. "
            "Name another folder, or give the options of that run"
        )


def remove_unused(folder: Path) -> None:
    """Remove the manifest of a run that ended before it had any detections: it binds nothing.

    Only for a process that has the folder for itself.
    """
    if not _has_detections(folder):
        with output_errors(folder / MANIFEST):
            (folder / MANIFEST).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of a manifest.

    Raises:
        SettingError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        contents = json.loads(path.read_text())
        if contents["identity"]["format"] != FORMAT:
            raise ValueError(f"its format is {contents['identity']['format']}")
        return contents
    except FileNotFoundError:
        raise SettingError(
            f"there are no results of `headoff evaluate` in {str(folder)!r}: check the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{str(path)!r} is no manifest of this version of headoff ({error_line(error)}): evaluate again, into "
            "another folder"
        ) from error


def threads_of(folder: Path) -> int | None:
    """The CPU threads of the run whose results are in the folder; None where there is none, or it was on a GPU."""
    return read_manifest(folder)["identity"].get("threads") if (folder / MANIFEST).exists() else None


def read_truth(folder: Path) -> GroundTruth:
    """The ground truth in a folder of results. Raises SettingError where it cannot be read."""
    path = folder / TRUTH
    try:
        with np.load(path, allow_pickle=False) as arrays:
            contents: dict[str, Any] = {field.name: arrays[field.name] for field in fields(GroundTruth)}
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(
            f"{str(path)!r} cannot be read ({error_line(error)}): evaluate again, into another folder"
        ) from error
    for name in ("class_names", "names"):
        contents[name] = tuple(contents[name].tolist())
    return GroundTruth(**contents)


def _has_detections(folder: Path) -> bool:
    return any((folder / FOLDER).glob("batch-*.parquet"))


def _differs(before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        lost, new = [one for one in before if one not in now], [one for one in now if one not in before]
        named = [
            f"{word} {', '.join(map(repr, some[:3]))}" + (" and others" if len(some) > 3 else "")
            for word, some in (("without", lost), ("with", new))
            if some
        ]
        return f"are {len(now)} instead of {len(before)}, {' and '.join(named) or 'in another order'}"
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64:
        return "differ"
    if isinstance(before, dict) and isinstance(now, dict):
        return "differ in " + ", ".join(key for key in {**before, **now} if before.get(key) != now.get(key))
    return f"was {'nothing' if before in (None, '') else before} and is {'nothing' if now in (None, '') else now}"


def _hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _hash_of_arrays(truth: GroundTruth) -> str:
    total = hashlib.sha256()
    for field in fields(truth):
        value = getattr(truth, field.name)
        data = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
        total.update(f"{field.name} {len(data)} ".encode() + data)
    return total.hexdigest()


def _hash_of_weights(detector: Detector) -> str:
    """SHA-256 of all weights, as they are."""
    total = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return total.hexdigest()


def _hash_of_code(parts: tuple[str, ...] = COMPUTING) -> str:
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for part in parts:
        for path in sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]:
            total.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return total.hexdigest()


def _hash_of_source(function: Any) -> str:
    """Of the file that an attention callable is defined in, which may be edited between two runs."""
    while hasattr(function, "func") or hasattr(function, "call"):
        function = getattr(function, "func", None) or function.call
    try:
        path = inspect.getsourcefile(function if hasattr(function, "__qualname__") else type(function))
        return _hash(Path(path).read_bytes()) if path else ""
    except (OSError, TypeError):
        return ""


def _version_of_transformers(detector: Detector) -> dict[str, str]:
    if not type(detector).__module__.startswith("headoff.family"):
        return {}
    import transformers

    return {"transformers": transformers.__version__}
