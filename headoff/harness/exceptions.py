"""What an attention raised, in one line for people."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import headoff

LONGEST = 300
"""Characters of an exception's own text."""


def describe_exception(error: BaseException) -> str:
    """`ValueError: its text (/home/me/kernel.py, line 7)`: the innermost line that is neither torch's nor headoff's."""
    text = " ".join(str(error).split())
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    message = f"{type(error).__name__}: {short}" if short else type(error).__name__
    frame = _frame_of_patch(traceback.extract_tb(error.__traceback__))
    return message if frame is None else f"{message} ({frame.filename}, line {frame.lineno})"


def _frame_of_patch(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame of a file that is nobody's library; of a library other than torch where there is none."""
    torch_folder, own_folder = Path(torch.__file__).parent, Path(headoff.__file__).parent
    others = [
        frame
        for frame in frames
        if not frame.filename.startswith((f"{torch_folder}/", f"{own_folder}/", "<"))
    ]
    patch = [frame for frame in others if not frame.filename.startswith(f"{torch_folder.parent}/")]
    return patch[-1] if patch else others[-1] if others else None
