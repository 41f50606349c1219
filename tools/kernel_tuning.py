"""Which tiles, warps, stages and shares of the Triton kernels are fastest here: every choice timed, the best printed.

    python tools/kernel_tuning.py                             on a GPU: all kernels, bfloat16 and float32
    python tools/kernel_tuning.py --only forward --only left  some of them
    TRITON_INTERPRET=1 python tools/kernel_tuning.py --dry-run    on a CPU: every choice at tiny sizes, no times

Each kernel is called at the shapes of DETR R50 at 800x1066, as the package calls it but for the choice. For a kernel of
attention, first tiles and warps are tried, then stages of the best of them, then, for the gradients of key and value,
in how many shares the rows are divided (`LEAST_SHARE`, `ENOUGH_PROGRAMS` of headoff/attention/fused.py). The kernels of
relevance have one tiling for all (`tiling` of headoff/relevance/fused_vjp.py), so calls of each are timed with it, and
so is `ENOUGH_PROGRAMS`, for which the rows of `left` are divided.

Every choice is first checked: against eager attention in float64, or the cams and gradients of plain PyTorch in
float64, in the dtype's own error. A choice that is wrong, or that this GPU has no registers or memory for, is listed
and not timed. Those that are right take turns, and the median of their times counts. Before each call the L2 cache is
flushed, and the device put to sleep for as long as the host needs to queue the call: these are times of kernels, not of
Python. A gradient's time has in it what comes with it in the same call (delta, for key and value; the sum of the
shares), which is the same for all choices of that kernel, or belongs to the choice.

The last line for each kernel says what to write where, where the best is faster than what is there by more than
`--gain`. Exits with 1 where a choice is wrong, with 2 where there is no GPU (or, dry, no interpreter).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from headoff.attention import eager, fused
from headoff.attention.fused import Tiling, Tilings, triton_attention
from headoff.detr.transformer import AttentionAddress
from headoff.errors import HeadoffError
from headoff.gates import HeadLayout, cumulative, stack
from headoff.relevance import fused_vjp
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.fused_vjp import FusedVjp
from headoff.relevance.records import AttentionRecord
from headoff.timing.calls import TimedCall
from headoff.timing.clocks import Clock, CudaClock

ROUNDS = 30
"""Times of each choice, of which the median counts."""

SLEEP = 4_000_000
"""Cycles of the device: 2 ms at 2 GHz, in which the host queues a backward pass several times over."""

ERROR_FACTOR, FLOOR = 4.0, 16.0
"""A result may be off by 4 times what the same formula in plain PyTorch is off by, and 16 roundings of its largest."""

GRADIENTS = {"forward": (), "query_gradient": (0,), "key_value_gradient": (1, 2)}
"""Kernels of attention, and which of query, key and value they are called for the gradients of."""

TILES = {
    "16 bits": [(32, 32), (32, 64), (64, 32), (64, 64), (32, 128), (128, 32), (128, 64), (64, 128)],
    "float32": [(16, 32), (32, 16), (32, 32), (16, 64), (64, 32), (64, 64)],
}
"""Rows and keys."""

WARPS, STAGES = (4, 8), (1, 2, 3)
SHARES = [(least, enough) for least in (128, 256, 512) for enough in (264, 448, 528)]
"""`LEAST_SHARE` and `ENOUGH_PROGRAMS` of attention."""

RELEVANCE_TILINGS = [
    fused_vjp.Tiling(rows, keys, warps, 2)
    for rows, keys, warps in ((64, 64, 8), (32, 32, 4), (32, 32, 8), (64, 32, 8), (32, 64, 8), (64, 64, 4), (16, 32, 4))
]  # fmt: skip
RELEVANCE_PROGRAMS = (264, 528, 1056)

Wanted = Callable[[str], bool]
"""Of the name of a kernel and call: whether it is to be tried."""


@dataclass(frozen=True)
class Sizes:
    """Of what is called: heads, channels, queries of a run, keys, pairs of relevance, and runs by the call's name.

    A call of None runs is an encoder's: as many queries as keys, no gate.
    """

    heads: int
    channels: int
    queries: int
    keys: int
    pairs: int
    runs: dict[str, int | None]


R50 = Sizes(8, 32, 100, 850, 45, {"cross, 9 runs": 9, "cross, 256 runs": 256, "encoder": None})
TINY = Sizes(2, 16, 3, 37, 2, {"cross, 3 runs": 3, "encoder": None})


@dataclass(frozen=True)
class Choice:
    """A tiling, and the numbers that say how rows are divided, of the kernels of either family."""

    tiling: Tiling | fused_vjp.Tiling
    least_share: int | None = None
    enough_programs: int | None = None

    def __str__(self) -> str:
        rows, keys, warps, stages = self.tiling
        numbers = {"LEAST_SHARE": self.least_share, "ENOUGH_PROGRAMS": self.enough_programs}
        divided = "".join(f", {name} {number}" for name, number in numbers.items() if number is not None)
        return f"{rows}x{keys}, {warps} warps, {stages} stages{divided}"


@dataclass(frozen=True)
class Task:
    """Calls of one kernel: `make(choice)` gives the side to be timed, `present` what the package chooses.

    - `truth`, `plain`: its results in float64, and by plain PyTorch in the dtype
    - `steps`: each makes of the best choice so far those that are tried next
    """

    name: str
    make: Callable[[Choice], TimedCall]
    present: Choice
    truth: list[Tensor]
    plain: list[Tensor]
    steps: list[Callable[[Choice], Iterable[Choice]]]

    def wrong(self, found: list[Tensor]) -> str | None:
        """What is wrong with results, in a few words."""
        for number, (one, truth, plain) in enumerate(zip(found, self.truth, self.plain, strict=True)):
            largest = float(truth.abs().max())
            allowed = ERROR_FACTOR * float((plain - truth).abs().max())
            allowed += FLOOR * torch.finfo(one.dtype).eps * largest
            error = float((one - truth).abs().max())
            if not error <= allowed:
                return f"result {number} is off by {error:.1e}, allowed are {allowed:.1e}"
        return None


@contextmanager
def chosen(kernel: str, choice: Choice) -> Iterator[None]:
    """The package with this choice for one kernel of attention, and its own for the others."""
    own = fused.tilings

    def tilings(query: Tensor, key: Tensor) -> Tilings:
        return own(query, key)._replace(**{kernel: Tiling(*choice.tiling)})

    with (
        patch.object(fused, "tilings", tilings),
        patch.object(fused, "LEAST_SHARE", choice.least_share or fused.LEAST_SHARE),
        patch.object(fused, "ENOUGH_PROGRAMS", choice.enough_programs or fused.ENOUGH_PROGRAMS),
    ):
        yield


class KernelClock(CudaClock):
    """As the benchmarks', but the device sleeps until the host has queued the timed call."""

    def prepare(self) -> None:
        """Flush the L2 cache, and sleep."""
        super().prepare()
        torch.cuda._sleep(SLEEP)


def attention_tasks(sizes: Sizes, device: torch.device, dtype: torch.dtype, only: Wanted) -> Iterator[Task]:
    """Forward and gradients, at each of the shapes, of those that are wanted."""
    for call, runs in sizes.runs.items():
        names = {
            kernel: f"attention.{kernel}, {call}, {str(dtype).removeprefix('torch.')}" for kernel in GRADIENTS
        }
        if not any(map(only, names.values())):
            continue
        rows = sizes.keys if runs is None else runs * sizes.queries
        generator = torch.Generator().manual_seed(rows)
        *inputs, upstream = (
            # As projections leave it.
            torch.randn(1, length, sizes.heads, sizes.channels, generator=generator)
            .to(device, dtype)
            .transpose(1, 2)
            for length in (rows, sizes.keys, sizes.keys, rows)
        )
        gate = None if runs is None else gate_of(runs, sizes, device, dtype)
        for kernel, name in names.items():
            if only(name):
                yield attention_task(kernel, name, inputs, upstream, gate)


def attention_task(
    kernel: str, name: str, inputs: list[Tensor], upstream: Tensor, gate: Tensor | None
) -> Task:
    """Of one kernel for query, key and value, and the gradient of the context."""
    wanted = GRADIENTS[kernel]
    divided = kernel == "key_value_gradient"

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        return [each.detach().to(dtype).requires_grad_(index in wanted) for index, each in enumerate(inputs)]

    def gradients(context: Tensor, of: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(context, [of[each] for each in wanted], upstream.to(context)))

    def by_eager(dtype: torch.dtype) -> list[Tensor]:
        of = leaves(dtype)
        context = eager(*of, head_gate=gate)
        return gradients(context, of) if wanted else [context]

    def make(choice: Choice) -> TimedCall:
        of = leaves(inputs[0].dtype)

        def forward() -> list[Tensor]:
            with chosen(kernel, choice):
                return [triton_attention(*of, head_gate=gate)]

        def prepare() -> tuple[Tensor]:
            return (triton_attention(*of, head_gate=gate),)

        def backward(context: Tensor) -> list[Tensor]:
            with chosen(kernel, choice):
                return gradients(context, of)

        return TimedCall(backward, prepare) if wanted else TimedCall(forward)

    present = Choice(getattr(fused.tilings(*inputs[:2]), kernel))
    if divided:
        present = replace(present, least_share=fused.LEAST_SHARE, enough_programs=fused.ENOUGH_PROGRAMS)
    dtype = inputs[0].dtype
    steps = attention_steps("float32" if dtype == torch.float32 else "16 bits", divided)
    return Task(name, make, present, by_eager(torch.float64), by_eager(dtype), steps)


def attention_steps(tiles: str, divided: bool) -> list[Callable[[Choice], Iterable[Choice]]]:
    """Tiles and warps; stages; and shares, where rows are divided."""

    def of_tiles(best: Choice) -> Iterable[Choice]:
        for (rows, keys), warps in product(TILES[tiles], WARPS):
            yield replace(best, tiling=Tiling(rows, keys, warps, best.tiling.stages))

    def of_stages(best: Choice) -> Iterable[Choice]:
        return [replace(best, tiling=Tiling(*best.tiling[:3], stages)) for stages in STAGES]

    def of_shares(best: Choice) -> Iterable[Choice]:
        return [replace(best, least_share=least, enough_programs=enough) for least, enough in SHARES]

    return [of_tiles, of_stages, *([of_shares] if divided else [])]


def gate_of(runs: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, H, runs x Q, 1): a cumulative sweep over and over, laid out as the decoder does."""
    sweep = cumulative(sizes.heads)
    gates = stack(sweep, HeadLayout(1, 1, sizes.heads, sizes.queries)).decoder_cross
    assert gates is not None
    by_run = gates[torch.arange(runs) % len(sweep), 0]  # (runs, 1, H)
    return by_run.expand(-1, sizes.queries, -1).flatten(0, 1).to(device, dtype).T[None, :, :, None]


def relevance_tasks(sizes: Sizes, device: torch.device, only: Wanted) -> Iterator[Task]:
    """Cams with gradients, and products with cams, of an encoder layer, of those that are wanted."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    shape = (1, sizes.heads, sizes.keys, sizes.channels)
    query, key, value, context = (draw(*shape) for _ in range(4))
    gradient = draw(sizes.pairs, *shape[1:])
    vectors, rows = draw(sizes.pairs, sizes.keys), draw(sizes.pairs, 6, sizes.keys)
    runs = torch.zeros(sizes.pairs, dtype=torch.long, device=device)
    present = fused_vjp.tiling(sizes.channels)

    def record(dtype: torch.dtype) -> AttentionRecord:
        tensors = (each.to(dtype) for each in (query, key, value))
        return AttentionRecord(AttentionAddress("encoder_self", 0), *tensors, None, None, context.to(dtype))

    single, double = record(torch.float32), record(torch.float64)

    def both(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        cams, inputs = vjp(gradient.to(dtype), runs)
        assert cams is not None and inputs is not None
        return [cams, *inputs]

    def right(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        return [vjp.right(gradient.to(dtype), runs, vectors.to(dtype))]

    def left(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        return [vjp.left(gradient.to(dtype), runs, rows.to(dtype))]

    def of_tilings(best: Choice) -> Iterable[Choice]:
        return [replace(best, tiling=tiling) for tiling in RELEVANCE_TILINGS]

    def of_programs(best: Choice) -> Iterable[Choice]:
        return [replace(best, enough_programs=enough) for enough in RELEVANCE_PROGRAMS]

    for kind, results in (("cams and gradients", both), ("right", right), ("left", left)):
        if not only(name := f"relevance.{kind}, encoder, {sizes.pairs} maps, float32"):
            continue

        def make(choice: Choice, results: Callable[..., list[Tensor]] = results) -> TimedCall:
            tiling = fused_vjp.Tiling(*choice.tiling)
            with patch.object(fused_vjp, "tiling", lambda _: tiling):
                vjp = FusedVjp(single, "gradient", tile=2**30)

            def call() -> list[Tensor]:
                programs = choice.enough_programs or fused_vjp.ENOUGH_PROGRAMS
                with patch.object(fused_vjp, "ENOUGH_PROGRAMS", programs):
                    return results(vjp, torch.float32)

            return TimedCall(call)

        divided = kind == "left"
        yield Task(
            name,
            make,
            Choice(present, enough_programs=fused_vjp.ENOUGH_PROGRAMS if divided else None),
            results(AttentionVjp(double, "gradient", batched=True), torch.float64),
            results(AttentionVjp(single, "gradient", batched=True), torch.float32),
            [of_tilings, *([of_programs] if divided else [])],
        )


@dataclass
class Findings:
    """Of one task: seconds of each choice that is right, and why the others are not timed."""

    seconds: dict[Choice, float]
    left_out: dict[Choice, str]
    wrong: bool = False


def tried(task: Task, choices: Iterable[Choice], findings: Findings) -> dict[Choice, TimedCall]:
    """Those of the choices that can be called and are right; the others are noted."""
    sides: dict[Choice, TimedCall] = {}
    for choice in dict.fromkeys(choices):
        side = task.make(choice)
        try:
            problem = task.wrong(side())
        except (HeadoffError, torch.OutOfMemoryError) as error:
            findings.left_out[choice] = " ".join(str(error).split())
            continue
        if problem is None:
            sides[choice] = side
        else:
            findings.left_out[choice], findings.wrong = f"WRONG: {problem}", True
    return sides


def tuned(task: Task, clock: Clock | None, rounds: int) -> Findings:
    """Step by step: each from the best of the one before. Without a clock all steps start from the present choice."""
    findings = Findings({}, {})
    best = task.present
    for step in task.steps:
        sides = tried(task, [task.present, best, *step(best)], findings)
        if clock is None:
            findings.seconds |= dict.fromkeys(sides, 0.0)
            continue
        times: dict[Choice, list[float]] = {choice: [] for choice in sides}
        for _ in range(rounds):
            for choice, side in sides.items():
                times[choice].append(side.seconds(clock))
        findings.seconds |= {choice: statistics.median(some) for choice, some in times.items()}
        if times:
            best = min(times, key=lambda choice: findings.seconds[choice])
    return findings


def report(task: Task, findings: Findings, gain: float, dry: bool) -> str:
    """The best few of a task, what was left out, and the verdict."""
    lines = [f"\n{task.name}"]
    if dry:
        lines.append(f"  {len(findings.seconds)} choices are right")
    elif findings.seconds:
        now = findings.seconds.get(task.present)
        ranked = sorted(findings.seconds, key=findings.seconds.__getitem__)
        for choice in ranked[:5] + ([task.present] if task.present in ranked[5:] else []):
            seconds = findings.seconds[choice]
            beside = "" if now is None else f"  {seconds / now:.3f} x the present"
            lines.append(f"  {seconds * 1e6:9.1f} us{beside}  {choice}")
        if now is None:
            lines.append(f"  -> the present choice cannot be: write {ranked[0]}")
        elif findings.seconds[ranked[0]] < now * (1 - gain):
            lines.append(f"  -> write {ranked[0]}, {1 - findings.seconds[ranked[0]] / now:.0%} less time")
        else:
            lines.append("  -> leave it as it is")
    lines += [f"  not timed: {choice}: {why[:200]}" for choice, why in findings.left_out.items()]
    return "\n".join(lines)


def missing(dry: bool) -> str | None:
    """Why it cannot be run, as a sentence; None where it can."""
    try:
        interpreted = bool(fused._kernels().INTERPRETED)
    except HeadoffError as error:
        return str(error)
    if dry and not interpreted:
        return "--dry-run runs in Triton's interpreter: set TRITON_INTERPRET=1."
    if not dry and interpreted:
        return (
            "TRITON_INTERPRET is set, and the interpreter's times mean nothing: unset it, or add --dry-run."
        )
    if not dry and not torch.cuda.is_available():
        return "times need a CUDA device: add --dry-run, with TRITON_INTERPRET=1, to go through the choices on a CPU."
    return None


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="kernels whose names contain this; can be repeated"
    )
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"),
                        help="of attention; can be repeated (default: bfloat16 and float32)")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"times of each choice (default: {ROUNDS})"
    )
    parser.add_argument(
        "--gain", type=float, default=0.03, help="share of time worth a change (default: 0.03)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check every choice at tiny sizes, time none")
    settings = parser.parse_args(command_line)
    if (reason := missing(settings.dry_run)) is not None:
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cpu" if settings.dry_run else settings.device)
    sizes = TINY if settings.dry_run else R50
    clock = None if settings.dry_run else KernelClock(device)
    dtypes = [getattr(torch, name) for name in settings.dtype or ("bfloat16", "float32")]
    if not settings.dry_run:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {settings.rounds} rounds")
    wrong = False

    def only(name: str) -> bool:
        return any(text in name for text in settings.only or [""])

    def tasks() -> Iterator[Task]:
        for dtype in dtypes:
            yield from attention_tasks(sizes, device, dtype, only)
        yield from relevance_tasks(sizes, device, only)

    # Where the clock's sleep and flush are, the kernels are to be.
    with nullcontext() if settings.dry_run else torch.cuda.device(device):
        for task in tasks():
            findings = tuned(task, clock, settings.rounds)
            wrong |= findings.wrong
            print(report(task, findings, settings.gain, settings.dry_run), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
