"""Every error that headoff raises on purpose.

Every message is one sentence that says what is wrong and what to do about it. The command line prints it without a
traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class HeadoffError(Exception):
    """Base class of everything headoff raises on purpose."""


class GateError(HeadoffError, ValueError):
    """An invalid head gate or configuration: text that cannot be read, a head that does not exist, a wrong shape."""


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
    """Results that cannot be written."""


class SettingError(HeadoffError, ValueError):
    """An invalid setting or argument: a confidence outside 0..1, thresholds in the wrong order."""


def did_you_mean(wrong: object, known: Iterable[str], *, most: int = 1) -> str:
    """The text ` (did you mean 'name'?)` to append to a wrong name; empty if no known name resembles or contains it."""
    names = list(known)
    similar = difflib.get_close_matches(str(wrong), names, n=most)
    similar = similar or [name for name in names if len(str(wrong)) > 2 and str(wrong) in name][:most]
    return f" (did you mean {' or '.join(map(repr, similar))}?)" if similar else ""


_NO_MEMORY = ("not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice: Python's, torch's on a GPU, or torch's on the CPU."""
    return (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in type(error).__name__
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )


def error_line(error: BaseException) -> str:
    """The first line of an exception's message, to quote in a message of ours: the system's words for an OSError, the
    name of the exception's type where it has no message.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first_line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return first_line[:160].rstrip(".;: ").replace("\0", "")


def root_cause_line(error: BaseException) -> str:
    """Type and message of the exception that caused `error`, in one line; a long message loses its middle.

    Compilers quote the source between the place of an error and its description, so both ends are needed.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else f'{text[:60]} ... {text[-135:]}'}"
