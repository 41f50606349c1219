"""What maintainers ask of the Triton kernels: which tiles are fastest on a GPU, and what the compiler makes of them.

    python tools/triton_kernels.py tune                           on a GPU: all kernels, bfloat16 and float32
    python tools/triton_kernels.py tune --only forward --only left    some of them
    TRITON_INTERPRET=1 python tools/triton_kernels.py tune --dry-run    on a CPU: every choice at tiny sizes, no times
    python tools/triton_kernels.py resources                      registers, spilling, shared memory; needs no GPU
    python tools/triton_kernels.py resources --only forward --tile 128x64 --warps 8 --stages 3    of other tiles

Both call attention and relevance at the shapes of DETR R50 at 800x1066, as the package calls them but for the choice.

`tune`: for a kernel of attention, first tiles and warps are tried, then stages of the best of them, then, for the
gradients of key and value, in how many shares the rows are divided (`LEAST_SHARE`, `ENOUGH_PROGRAMS` of
headoff/attention/fused.py). The kernels of relevance have one tiling for all (`tiling` of
headoff/relevance/fused_vjp.py); for `left` its `ENOUGH_PROGRAMS` is tried as well. Every choice is first checked:
attention as in `headoff bench`, relevance against plain PyTorch in float64. A choice that is wrong, or that the GPU has
no registers or memory for, is listed and not timed. Those that are right take turns, and the median of their times
counts. Before each call the L2 cache is flushed, and the device put to sleep for as long as the host needs to queue the
call: these are times of kernels, not of Python. The last line for each kernel says what to write, where the best is
faster than what is there by more than `--gain`. Exits with 1 where a choice is wrong.

`resources`: what the package would launch is recorded, and each kernel compiled for sm_80 and sm_90. The table has the
registers and spilled bytes of a thread (local memory, which these kernels have for nothing else) as they stand in the
machine code, and the shared memory of a program.

Exits with 2 where a GPU, Triton or its interpreter is needed and missing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

from headoff.attention import fused
from headoff.attention.fused import triton_attention
from headoff.bench.calls import AttentionShape, AttentionWorkload
from headoff.bench.outputs import ExpectedOutputs
from headoff.bench.suites import check_of, spread
from headoff.bench.workloads import Direction
from headoff.calls import AttentionAddress
from headoff.errors import HeadoffError
from headoff.harness.finding import Property
from headoff.harness.tolerance import allowed_error
from headoff.relevance import fused_vjp
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.fused_vjp import FusedVjp
from headoff.relevance.records import AttentionRecord
from headoff.timing import Clock, TimedCall, time_in_turns
from headoff.timing.clocks import CudaClock
from headoff.wording import markdown_table

AnyTiling = TypeVar("AnyTiling", fused.Tiling, fused_vjp.Tiling)

ROUNDS = 30
"""Times of each choice, of which the median counts."""

SLEEP = 4_000_000
"""Cycles of the device: 2 ms at 2 GHz, in which the host queues a backward pass several times over."""

FLOOR = 16.0
"""Roundings of a result's largest number, allowed in addition to a factor of what plain PyTorch is off by."""

GRADIENTS: dict[str, tuple[Property, ...]] = {
    "forward": (),
    "query_gradient": ("dq",),
    "key_value_gradient": ("dk", "dv"),
}
"""Kernels of attention, and the gradients that they are called for."""

Step = list[dict[str, int]]
"""Fields of `Choice` to be tried."""

TILES = {
    "16 bits": [(32, 32), (32, 64), (64, 32), (64, 64), (32, 128), (128, 32), (128, 64), (64, 128)],
    "float32": [(16, 32), (32, 16), (32, 32), (16, 64), (64, 32), (64, 64)],
}
STAGES: Step = [{"stages": stages} for stages in (1, 2, 3)]
SHARES: Step = [
    {"least_share": least, "enough_programs": enough}
    for least, enough in product((128, 256, 512), (264, 448, 528))
]
RELEVANCE_TILINGS: Step = [
    {"rows": rows, "keys": keys, "warps": warps, "stages": 2}
    for rows, keys, warps in ((64, 64, 8), (32, 32, 4), (32, 32, 8), (64, 32, 8), (32, 64, 8), (64, 64, 4), (16, 32, 4))
]  # fmt: skip
RELEVANCE_PROGRAMS: Step = [{"enough_programs": enough} for enough in (264, 528, 1056)]

LAYERS = 6
ARCHITECTURES = (80, 90)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*u1", torch.int64: "*i64"}


# --- the calls, and the choice they are made with -----------------------------------------------------------


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


def attention_workload(
    call: str,
    runs: int | None,
    direction: Direction,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionWorkload:
    """One attention call with random inputs. Its gates are those of a cumulative sweep, over and over."""
    rows = sizes.keys if runs is None else runs * sizes.queries
    shape = AttentionShape(call, 1, rows, sizes.keys, sizes.heads, sizes.channels)
    gate = None
    if runs is not None:
        sweep = torch.arange(sizes.heads) >= torch.arange(sizes.heads + 1)[:, None]
        gate = spread(sweep[torch.arange(runs) % len(sweep)].float(), shape)
    return AttentionWorkload.of(shape, direction, gate, "cumulative", device, dtype)


@dataclass(frozen=True)
class Choice:
    """A tiling, and the numbers that say how rows are divided; None is the package's own."""

    rows: int | None = None
    keys: int | None = None
    warps: int | None = None
    stages: int | None = None
    least_share: int | None = None
    enough_programs: int | None = None

    def of(self, tiling: AnyTiling) -> AnyTiling:
        """`tiling`, with what is chosen in place of its numbers."""
        chosen = (self.rows, self.keys, self.warps, self.stages)
        return type(tiling)(*(own if one is None else one for one, own in zip(chosen, tiling, strict=True)))

    def __str__(self) -> str:
        numbers = {"LEAST_SHARE": self.least_share, "ENOUGH_PROGRAMS": self.enough_programs}
        divided = "".join(f", {name} {number}" for name, number in numbers.items() if number is not None)
        return f"{self.rows}x{self.keys}, {self.warps} warps, {self.stages} stages{divided}"


@contextmanager
def choosing(choice: Choice, kernel: str | None = None) -> Iterator[None]:
    """The package with this choice: of the kernels of relevance and all those of attention, or one of the latter."""
    own_tilings, own_tiling = fused.tilings, fused_vjp.tiling

    def tilings(query: Tensor, key: Tensor) -> fused.Tilings:
        own = own_tilings(query, key)
        names = own._fields if kernel is None else (kernel,)
        return own._replace(**{name: choice.of(getattr(own, name)) for name in names})

    changes: list[tuple[Any, str, Any]] = [
        (fused, "tilings", tilings),
        (fused_vjp, "tiling", lambda channels: choice.of(own_tiling(channels))),
    ]
    if choice.least_share is not None:
        changes.append((fused, "LEAST_SHARE", choice.least_share))
    if choice.enough_programs is not None:
        changes += [(module, "ENOUGH_PROGRAMS", choice.enough_programs) for module in (fused, fused_vjp)]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        yield


# --- tune ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Calls of one kernel.

    Attributes:
        make: the call to be timed, with a choice.
        wrong: what is wrong with its result, in a few words.
        present: what the package chooses.
        steps: what is tried, one after the other, with the best of the steps before.
    """

    name: str
    make: Callable[[Choice], TimedCall]
    wrong: Callable[[Any], str | None]
    present: Choice
    steps: list[Step]


class KernelClock(CudaClock):
    """As the benchmarks', but the device sleeps until the host has queued the timed call."""

    def prepare(self) -> None:
        """Flush the L2 cache, and sleep."""
        super().prepare()
        torch.cuda._sleep(SLEEP)


Wanted = Callable[[str], bool]
"""Of the name of a kernel and call: whether it is to be tried."""


def attention_tasks(sizes: Sizes, device: torch.device, dtype: torch.dtype, only: Wanted) -> Iterator[Task]:
    """Forward and gradients, at each of the shapes, of those that are wanted."""
    for (call, runs), (kernel, gradients) in product(sizes.runs.items(), GRADIENTS.items()):
        name = f"attention.{kernel}, {call}, {str(dtype).removeprefix('torch.')}"
        if only(name):
            direction: Direction = "backward" if gradients else "forward"
            workload = attention_workload(call, runs, direction, sizes, device, dtype)
            yield attention_task(kernel, name, replace(workload, gradients=gradients))


def attention_task(kernel: str, name: str, workload: AttentionWorkload) -> Task:
    """Of one kernel of attention."""
    expected, call = ExpectedOutputs(workload), workload.timed_call(triton_attention)

    def make(choice: Choice) -> TimedCall:
        def run(*arguments: Any) -> Any:
            with choosing(choice, kernel):
                return call.run(*arguments)

        return TimedCall(run, call.setup)

    present = Choice(*getattr(fused.tilings(workload.query, workload.key), kernel))
    tiles = TILES["float32" if workload.dtype == torch.float32 else "16 bits"]
    steps: list[Step] = [
        [{"rows": rows, "keys": keys, "warps": warps} for (rows, keys), warps in product(tiles, (4, 8))],
        STAGES,
    ]
    if kernel == "key_value_gradient":
        present = replace(present, least_share=fused.LEAST_SHARE, enough_programs=fused.ENOUGH_PROGRAMS)
        steps.append(SHARES)
    return Task(name, make, check_of(expected, triton_attention), present, steps)


def relevance_tasks(sizes: Sizes, device: torch.device, only: Wanted) -> Iterator[Task]:
    """Cams with gradients, and products with cams, of an encoder layer, of those that are wanted."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    shape = (1, sizes.heads, sizes.keys, sizes.channels)
    query, key, value, context = (draw(*shape) for _ in range(4))
    gradient = draw(sizes.pairs, *shape[1:])
    vectors, rows = draw(sizes.pairs, sizes.keys), draw(sizes.pairs, LAYERS, sizes.keys)
    runs = torch.zeros(sizes.pairs, dtype=torch.long, device=device)

    def record(dtype: torch.dtype) -> AttentionRecord:
        tensors = (one.to(dtype) for one in (query, key, value))
        return AttentionRecord(AttentionAddress("encoder_self", 0), *tensors, None, None, context.to(dtype))

    def both(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        cams, inputs = vjp(gradient.to(dtype), runs)
        assert cams is not None and inputs is not None
        return [cams, *inputs]

    def right(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        return [vjp.right(gradient.to(dtype), runs, vectors.to(dtype))]

    def left(vjp: AttentionVjp, dtype: torch.dtype) -> list[Tensor]:
        return [vjp.left(gradient.to(dtype), runs, rows.to(dtype))]

    def plain(results: Callable[..., list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
        return results(AttentionVjp(record(dtype), "gradient", batched=True), dtype)

    for kind, results in (("cams and gradients", both), ("right", right), ("left", left)):
        if not only(name := f"relevance.{kind}, encoder, {sizes.pairs} maps, float32"):
            continue

        def make(choice: Choice, results: Callable[..., list[Tensor]] = results) -> TimedCall:
            with choosing(choice):
                vjp = FusedVjp(record(torch.float32), "gradient", tile=2**30)

            def call() -> list[Tensor]:
                with choosing(choice):
                    return results(vjp, torch.float32)

            return TimedCall(call)

        present = Choice(*fused_vjp.tiling(sizes.channels))
        steps = [RELEVANCE_TILINGS]
        if kind == "left":
            present = replace(present, enough_programs=fused_vjp.ENOUGH_PROGRAMS)
            steps.append(RELEVANCE_PROGRAMS)
        wrong = partial(mismatch, plain(results, torch.float64), plain(results, torch.float32))
        yield Task(name, make, wrong, present, steps)


def mismatch(exact: list[Tensor], plain: list[Tensor], found: list[Tensor]) -> str | None:
    """What is wrong with results, compared with those in float64 and with the error of plain PyTorch in float32."""
    for number, (one, truth, other) in enumerate(zip(found, exact, plain, strict=True)):
        floor = FLOOR * torch.finfo(one.dtype).eps * float(truth.abs().max())
        allowed = allowed_error(float((other - truth).abs().max()), floor)
        error = float((one - truth).abs().max())
        if not error <= allowed:
            return f"result {number} is off by {error:.1e}, allowed are {allowed:.1e}"
    return None


@dataclass
class Findings:
    """Of one task: seconds of each choice that is right, and why the others are not timed."""

    seconds: dict[Choice, float] = field(default_factory=dict)
    left_out: dict[Choice, str] = field(default_factory=dict)
    wrong: bool = False


def right_calls(task: Task, choices: list[Choice], findings: Findings) -> dict[Choice, TimedCall]:
    """Those of the choices that can be called and are right; the others are noted."""
    calls: dict[Choice, TimedCall] = {}
    for choice in dict.fromkeys(choices):
        call = task.make(choice)
        try:
            problem = task.wrong(call())
        except (HeadoffError, torch.OutOfMemoryError) as error:
            findings.left_out[choice] = " ".join(str(error).split())
            continue
        if problem is None:
            calls[choice] = call
        else:
            findings.left_out[choice], findings.wrong = f"WRONG: {problem}", True
    return calls


def tuned(task: Task, clock: Clock | None, rounds: int) -> Findings:
    """Step by step: each from the best of the one before. Without a clock all steps start from the present choice."""
    findings = Findings()
    best = task.present
    for step in task.steps:
        choices = [task.present, best, *(replace(best, **fields) for fields in step)]
        calls = right_calls(task, choices, findings)
        if clock is None:
            findings.seconds |= dict.fromkeys(calls, 0.0)
        elif calls:
            times = time_in_turns([*calls.values()], clock, seconds=0, rounds=rounds)
            findings.seconds |= {
                choice: statistics.median(some) for choice, some in zip(calls, times, strict=True)
            }
            best = min(calls, key=findings.seconds.__getitem__)
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
            compared = "" if now is None else f"  {seconds / now:.3f} x the present"
            lines.append(f"  {seconds * 1e6:9.1f} us{compared}  {choice}")
        if now is None:
            lines.append(f"  -> the present choice cannot be: write {ranked[0]}")
        elif findings.seconds[ranked[0]] < now * (1 - gain):
            lines.append(f"  -> write {ranked[0]}, {1 - findings.seconds[ranked[0]] / now:.0%} less time")
        else:
            lines.append("  -> leave it as it is")
    lines += [f"  not timed: {choice}: {why[:200]}" for choice, why in findings.left_out.items()]
    return "\n".join(lines)


def tune(settings: argparse.Namespace, only: Wanted) -> int:
    """Try all choices; returns the exit code."""
    dry = settings.dry_run
    device = torch.device("cpu" if dry else settings.device)
    sizes = TINY if dry else R50
    clock = None if dry else KernelClock(device)
    if not dry:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {settings.rounds} rounds")

    def tasks() -> Iterator[Task]:
        for name in settings.dtype or ("bfloat16", "float32"):
            yield from attention_tasks(sizes, device, getattr(torch, name), only)
        yield from relevance_tasks(sizes, device, only)

    wrong = False
    # Where the clock's sleep and flush are, the kernels are to be.
    with nullcontext() if dry else torch.cuda.device(device):
        for task in tasks():
            findings = tuned(task, clock, settings.rounds)
            wrong |= findings.wrong
            print(report(task, findings, settings.gain, dry), flush=True)
    return int(wrong)


# --- resources ----------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel as the package would launch it. `arguments`: all, by name."""

    kernel: str
    call: str
    dtype: torch.dtype
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """What tells a launch from the others."""
        tile = "x".join(str(self.arguments[name]) for name in ("BLOCK_Q", "BLOCK_K", "CHANNELS"))
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.kernel.removesuffix("_kernel"), self.call, dtype, tile]


def kernel_of(name: str) -> Any:
    from headoff.attention import triton_kernels
    from headoff.relevance import fused_kernels

    family, kernel = name.split(".")
    return getattr({"attention": triton_kernels, "relevance": fused_kernels}[family], kernel)


def launches_of(kernels: MagicMock, family: str, call: str, dtype: torch.dtype) -> Iterator[Launch]:
    """What was launched of `kernels`, which took the place of a module: `kernels.name[grid](...)`."""
    for path, given, named in kernels.mock_calls:
        if path.endswith("__getitem__()"):
            kernel = f"{family}.{path.partition('.')[0]}"
            arguments = dict(zip(kernel_of(kernel).arg_names, given, strict=False)) | named
            settings = ("num_warps", "num_stages", "enable_fp_fusion")
            options = {option: arguments.pop(option) for option in settings if option in arguments}
            yield Launch(kernel, call, dtype, arguments, options)


def attention_launches(sizes: Sizes) -> Iterator[Launch]:
    """Of a forward and a backward pass of every call."""
    for (call, runs), dtype in product(sizes.runs.items(), (torch.bfloat16, torch.float32)):
        device = torch.device("cpu")
        workload = attention_workload(call, runs, "forward + backward", sizes, device, dtype)
        # The interpreter asks for no GPU.
        with patch.object(fused, "_kernels", return_value=(kernels := MagicMock(INTERPRETED=True))):
            workload.timed_call(triton_attention)()
        yield from launches_of(kernels, "attention", call, dtype)


def relevance_launches(sizes: Sizes) -> Iterator[Launch]:
    """Of cams with gradients, and for the encoder of products with cams, all pairs in one launch."""
    for call, runs, rows in (("cross", 9, sizes.queries), ("encoder", 1, sizes.keys)):
        query = torch.empty(runs, sizes.heads, rows, sizes.channels, device="meta")
        key = query.new_empty(1, sizes.heads, sizes.keys, sizes.channels)
        record = AttentionRecord(AttentionAddress("encoder_self", 0), query, key, key, None, None, query)
        with patch.object(fused_vjp, "_kernels", return_value=(kernels := MagicMock(INTERPRETED=True))):
            vjp = FusedVjp(record, "gradient", tile=2**40)
            gradient = query.new_empty(sizes.pairs, *query.shape[1:])
            of_pairs = torch.empty(sizes.pairs, dtype=torch.int64, device="meta")
            vjp(gradient, of_pairs)
            if call == "encoder":
                vjp.right(gradient, of_pairs, query.new_empty(sizes.pairs, sizes.keys))
                vjp.left(gradient, of_pairs, query.new_empty(sizes.pairs, LAYERS, rows))
        yield from launches_of(kernels, "relevance", f"{call}, {sizes.pairs} maps", torch.float32)


class Resources(NamedTuple):
    """Registers and spilled bytes of a thread, shared bytes of a program."""

    registers: int
    spilled: int
    shared: int


def compiled(launch: Launch, capability: int) -> Resources:
    """What the kernel takes that Triton would compile for `launch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel_of(launch.kernel), *specialised(launch))
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Resources(int(numbers["REG"]), int(numbers["STACK"]), binary.metadata.shared)


def specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes: numbers that are 1, or multiples of 16, are known to the compiler.

    As are addresses, for torch allocates at multiples of 512 bytes.
    """
    types, constants, attributes = {}, {}, {}

    def type_of(place: tuple[int, ...], parameter: Any, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of((*place, index), parameter, one) for index, one in enumerate(value))
        known = not parameter.do_not_specialize
        if value is None or parameter.is_constexpr or isinstance(value, int) and value == 1 and known:
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        multiple = isinstance(value, Tensor) or value % 16 == 0
        if multiple and known and not parameter.do_not_specialize_on_alignment:
            attributes[place] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"

    for index, parameter in enumerate(kernel_of(launch.kernel).params):
        types[parameter.name] = type_of((index,), parameter, launch.arguments[parameter.name])
    return types, constants, attributes


def resources(settings: argparse.Namespace, only: Wanted) -> int:
    """Compile all launches and print the table; returns the exit code."""
    import triton

    choice = Choice(*(settings.tile or (None, None)), settings.warps, settings.stages)
    with choosing(choice):
        launches = [
            launch
            for channels in ((32, 64, 128) if settings.all else (R50.channels,))
            for launches_at in (attention_launches, relevance_launches)
            for launch in launches_at(replace(R50, channels=channels))
            if only(launch.kernel)
        ]
    rows = []
    for number, launch in enumerate(launches, 1):
        print(f"{number} of {len(launches)}: {', '.join(launch.labels)}", file=sys.stderr, flush=True)
        found = [compiled(launch, capability) for capability in ARCHITECTURES]
        options = launch.options
        rows.append([
            *launch.labels, str(options["num_warps"]), str(options["num_stages"]),
            " / ".join(str(one.registers) for one in found),
            " / ".join(str(one.spilled) for one in found),
            " / ".join(f"{one.shared / 2**10:.1f}" for one in found),
        ])  # fmt: skip
    head = [
        "kernel",
        "call",
        "dtype",
        "rows x keys x D",
        "warps",
        "stages",
        "registers",
        "spilled, B",
        "shared, KiB",
    ]
    print(f"Compiled by Triton {triton.__version__}, sm_80 / sm_90:\n")
    print("\n".join(markdown_table(head, rows)))
    return 0


# --- the command --------------------------------------------------------------------------------------------


def tile_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no tile: write rows and keys, as in 64x32")
    return int(match[1]), int(match[2])


def problem(settings: argparse.Namespace) -> str | None:
    """Why the command cannot be run, as a sentence; None where it can. Raises HeadoffError without Triton."""
    interpreted = bool(fused._kernels().INTERPRETED)
    if settings.command == "resources":
        return "the interpreter compiles nothing: unset TRITON_INTERPRET." if interpreted else None
    if settings.dry_run and not interpreted:
        return "--dry-run runs in Triton's interpreter: set TRITON_INTERPRET=1."
    if not settings.dry_run and (interpreted or not torch.cuda.is_available()):
        return "times need a CUDA device and compiled kernels: unset TRITON_INTERPRET, or add --dry-run on a CPU."
    return None


def main(command_line: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    of_both = argparse.ArgumentParser(add_help=False)
    of_both.add_argument(
        "--only", action="append", metavar="TEXT", help="kernels whose names contain this; can be repeated"
    )
    one = commands.add_parser("tune", parents=[of_both], help="try tiles, warps, stages and shares on a GPU")
    one.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"),
                     help="of attention; can be repeated (default: bfloat16 and float32)")  # fmt: skip
    one.add_argument("--device", default="cuda", help="default: cuda")
    one.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each choice (default: {ROUNDS})")
    one.add_argument("--gain", type=float, default=0.03, help="share of time worth a change (default: 0.03)")
    one.add_argument("--dry-run", action="store_true", help="check every choice at tiny sizes, time none")
    one = commands.add_parser("resources", parents=[of_both], help="what the compiler makes of the kernels")
    one.add_argument("--all", action="store_true", help="heads of 32, 64 and 128 channels (default: 32)")
    one.add_argument("--tile", type=tile_of, metavar="ROWSxKEYS", help="default: what the package chooses")
    one.add_argument("--warps", type=int, help="of a program; default: what the package chooses")
    one.add_argument("--stages", type=int, help="of a pipeline; default: what the package chooses")
    settings = parser.parse_args(command_line)
    try:
        reason = problem(settings)
    except HeadoffError as error:
        reason = str(error)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2

    def only(name: str) -> bool:
        return any(text in name for text in settings.only or [""])

    return (tune if settings.command == "tune" else resources)(settings, only)


if __name__ == "__main__":
    sys.exit(main())
