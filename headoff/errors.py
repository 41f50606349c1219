"""Every error that headoff raises on purpose.

The message of each is one sentence that names the culprit and the remedy: the command line prints it as it
stands and exits with code 2, so it must read well without a traceback around it.
"""

import difflib
from collections.abc import Iterable


class HeadoffError(Exception):
    """Base class of everything headoff raises on purpose."""


class GateError(HeadoffError, ValueError):
    """A head gate or configuration that cannot be: bad text, a head that does not exist, a wrong shape."""


class AttentionError(HeadoffError):
    """An attention callable that cannot be found, has the wrong signature, or breaks the contract."""


class ImageError(HeadoffError, ValueError):
    """An image that is missing, unreadable, truncated, too small or too large."""


class CheckpointError(HeadoffError):
    """A checkpoint that is missing, corrupt, unsafe to load, or of another architecture."""


class DownloadError(CheckpointError):
    """Published weights that could not be downloaded or whose SHA-256 does not match."""


class NonFiniteError(HeadoffError, ArithmeticError):
    """NaN or infinity where numbers must be finite; the message says where it appeared first."""


class OutputError(HeadoffError, OSError):
    """Results that cannot be written where they were asked to go."""


class SettingError(HeadoffError, ValueError):
    """A setting or argument that cannot be: a confidence outside 0..1, thresholds in the wrong order."""


def did_you_mean(wrong: object, known: Iterable[str], *, most: int = 1) -> str:
    """` (did you mean 'near'?)`, to be put behind a wrong name; nothing where none is near or contains it."""
    names = list(known)
    near = difflib.get_close_matches(str(wrong), names, n=most)
    near = near or [name for name in names if len(str(wrong)) > 2 and str(wrong) in name][:most]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
