"""Whether a patch computes its own context, or quietly lets something else do it.

A kernel that fails, or does not know a shape, is often wrapped so that torch's attention takes over. Then everything is
right, nothing is tested, and a benchmark compares torch with torch. Two signs give it away without knowing the patch:

- it answers, although an exception was raised and caught in its own file;
- at some sites, or with a mask, torch's SDPA runs inside it, and elsewhere it does not.

A patch that is made of torch's SDPA shows neither: it calls it every time, on purpose.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from headoff.attention import AdaptedAttention, Attention
from headoff.harness.finding import Finding
from headoff.harness.plugin.preflight import SHAPES

Call = Callable[[], Tensor]

MONITORING_TOOLS = (4, 3)
"""Ids of `sys.monitoring` that are set aside for no kind of tool (0 is a debugger, 1 coverage, 2 a profiler)."""


def model_calls(attention: Attention, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Call]:
    """Calls as the bundled model makes them at each site, with none off, of one image and of a padded batch.

    For `fallbacks`. Other channels, other dtypes and calls without a gate are left out: an attention that
    passes on what it was not made for, or what torch does as well, hides nothing.
    """

    def calling(site: str, padded: bool) -> Call:
        generator = torch.Generator().manual_seed(seed)
        queries, keys = SHAPES[site]
        query, key, value = (
            torch.randn(1, 8, length, 32, generator=generator).to(device, dtype)
            for length in (queries, keys, keys)
        )
        mask = (torch.arange(keys, device=device) < keys - 10).view(1, 1, 1, keys) if padded else None
        gate = torch.ones(8, 1, 1, device=device, dtype=dtype)
        return lambda: attention(query, key, value, mask, head_gate=gate)

    calls = {site: calling(site, padded=False) for site in SHAPES}
    masked = ("encoder_self", "decoder_cross")
    return calls | {f"{site}{MASKED}": calling(site, padded=True) for site in masked}


class SdpaCount(TorchFunctionMode):
    """Counts calls of torch's scaled dot-product attention while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            self.calls += 1
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Fallback:
    """What gives a fallback away.

    Attributes:
        kinds: of `headoff.harness.settings.FALLBACKS`: it is as declared where all of one of these sets are.
    """

    finding: Finding
    kinds: tuple[frozenset[str], ...]

    def is_declared(self, allowed: Iterable[str], device: torch.device) -> bool:
        """Whether it is intended, by the kinds that are allowed."""
        declared = {*allowed}
        on_cpu = device.type == "cpu" and "cpu" in declared
        return on_cpu or any(kinds <= declared for kinds in self.kinds)


MASKED = " with a mask"
"""Ends the names of calls that have one."""


def fallbacks(attention: Attention, calls: dict[str, Call]) -> list[Fallback]:
    """What gives a fallback away, each.

    `calls`: by the name of a site, or another name, a function that calls `attention` as is done there.
    """
    found = []
    by_sdpa = {}
    for site, call in calls.items():
        call()  # what is set up once is set up here
        with SdpaCount() as count:
            call()
        by_sdpa[site] = count.calls
        caught = exceptions_caught(attention, call)
        if caught:
            message = f"called as in {site}, it raised and caught {caught[0]}, and answered all the same: "
            message += "what it falls back to was tested in its place"
            kinds = ("exception", "masked") if site.endswith(MASKED) else ("exception",)
            either = tuple(frozenset({kind}) for kind in kinds)
            found.append(Fallback(Finding("calls", message, site), either))
    with_sdpa = [site for site, count in by_sdpa.items() if count]
    if with_sdpa and len(with_sdpa) < len(by_sdpa):
        without = [site for site in by_sdpa if site not in with_sdpa]
        message = "it falls back to torch's scaled_dot_product_attention as called in "
        message += f"{' and '.join(with_sdpa)}, but not in {' and '.join(without)}"
        plain = {site for site in with_sdpa if not site.endswith(MASKED)}
        of_mask = [site for site in with_sdpa if site not in plain and site.removesuffix(MASKED) not in plain]
        all_of = frozenset([*(["sizes"] if plain else []), *(["masked"] if of_mask else [])])
        found.append(Fallback(Finding("calls", message, with_sdpa[0]), (all_of,)))
    return found


def exceptions_caught(attention: Attention, call: Call) -> list[str]:
    """Exceptions that passed through the attention's own file while `call` succeeded: `ValueError: text (line 7)`.

    Raises what `call` raises.
    """
    file = source_file(attention)
    return [] if file is None else exceptions_inside(call, lambda name: name == file)


def exceptions_inside(body: Callable[[], object], of_interest: Callable[[str], bool]) -> list[str]:
    """Exceptions that were raised in, or passed through, code of certain files while `body` ran and returned.

    Args:
        body: what to run.
        of_interest: whether the code of a file, by its name, is looked at.

    Returns:
        A line for each frame that an exception was in: `ValueError: text (line 7)`.
    """
    seen: list[str] = []

    def record(error: BaseException, line: int | None) -> None:
        # Generators end by an exception, too.
        if not isinstance(error, (StopIteration, GeneratorExit, StopAsyncIteration)):
            seen.append(f"{type(error).__name__}: {' '.join(str(error).split())} (line {line})")

    with _watched_exceptions(of_interest, record):
        body()
    return seen


@contextmanager
def _watched_exceptions(
    of_interest: Callable[[str], bool], record: Callable[[BaseException, int | None], None]
) -> Iterator[None]:
    """`record(error, line)` for each frame that an exception is raised in or passes through.

    Python 3.12 and later use `sys.monitoring`, which leaves debuggers and coverage undisturbed. Python 3.11 offers only
    the thread's trace function for this: it is replaced for this one call, and restored.
    """
    if sys.version_info < (3, 12):

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "exception":
                kind, error, _ = argument
                record(error if isinstance(error, BaseException) else kind(error), frame.f_lineno)
            return local

        before = sys.gettrace()
        sys.settrace(lambda frame, event, argument: local if of_interest(frame.f_code.co_filename) else None)
        try:
            yield
        finally:
            sys.settrace(before)
    else:
        monitoring = sys.monitoring
        free = [tool for tool in MONITORING_TOOLS if monitoring.get_tool(tool) is None]
        if not free:  # others watch this process; nothing is found then, and nothing is disturbed
            yield
            return

        def raised(code: CodeType, offset: int, error: BaseException) -> None:
            if of_interest(code.co_filename):
                lines = (line for start, end, line in code.co_lines() if start <= offset < end)
                record(error, next(lines, None))

        tool = free[0]
        monitoring.use_tool_id(tool, "headoff")
        monitoring.register_callback(tool, monitoring.events.RAISE, raised)
        monitoring.set_events(tool, monitoring.events.RAISE)
        try:
            yield
        finally:
            monitoring.set_events(tool, monitoring.events.NO_EVENTS)
            monitoring.register_callback(tool, monitoring.events.RAISE, None)
            monitoring.free_tool_id(tool)


def source_file(attention: Attention) -> str | None:
    """The file the attention is written in, where that is a file of its user's."""
    inner: Any = attention.call if isinstance(attention, AdaptedAttention) else attention
    inner = getattr(inner, "func", inner)  # a partial
    if isinstance(inner, torch.nn.Module):
        inner = type(inner).forward
    elif not inspect.isroutine(inner):
        inner = type(inner).__call__
    try:
        file = inspect.getfile(inspect.unwrap(inner))
    except (TypeError, OSError):
        return None
    return None if Path(file).is_relative_to(Path(torch.__file__).parent) else file
