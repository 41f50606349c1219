"""What the compiler says of the Triton kernels, and what arithmetic expects of them on an H200. Needs no GPU.

    python tools/kernel_resources.py                                    as used, heads of 32 channels
    python tools/kernel_resources.py --all                              64 and 128 channels as well
    python tools/kernel_resources.py --only forward --tile 128x64 --warps 8 --stages 3    other tiles

Attention and relevance are called at the shapes of DETR R50 at 800x1066, and what they would launch is recorded: the
same kernels, tiles and grids as on a GPU. Each is compiled for sm_80 and sm_90, one at a time, and two tables are
printed. The first is the compiler's: registers and spilled bytes of a thread (local memory, which these kernels have
for nothing else) as they stand in the machine code, and the shared memory of a program. The second is arithmetic, no
measurement. Every head is on; a launch takes at least as long as the longest of

- products: its matrix products, on tensor cores (989 TFLOP/s in bfloat16, half of that in TF32) or, where they are
  exact, by FMA (67 TFLOP/s);
- exp: one exponential for each score, by special function units, 8 times slower than FMA;
- memory: every argument read or written once at 4.8 TB/s;
- chain: steps of a program's loop, one after another, for each wave of programs that the multiprocessors hold. A step
  takes `--step-cycles`, which is an assumption: products that depend on each other, and the reductions in between.

"Bound by" names the longest, and those within a factor of 2 of it, which such arithmetic cannot tell apart. Exits with
2 where Triton or its CUDA tools are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from headoff.attention import fused
from headoff.detr.transformer import AttentionAddress
from headoff.relevance import fused_vjp
from headoff.relevance.records import AttentionRecord

AnyTiling = TypeVar("AnyTiling", fused.Tiling, fused_vjp.Tiling)

HEADS, QUERIES, KEYS, LAYERS = 8, 100, 850, 6
PAIRS = 45
"""Maps of relevance that are made together: 9 configurations of 5 objects."""

ARCHITECTURES = (80, 90)
PRODUCTS = {
    "attention.forward_kernel": 2,
    "attention.query_gradient_kernel": 3,
    "attention.key_value_gradient_kernel": 4,
    "relevance.cam_kernel": 3,
    "relevance.key_value_gradient_kernel": 4,
    "relevance.right_kernel": 2,
    "relevance.left_kernel": 2,  # that with the vectors is of the mean over heads: 1% more
}
"""Products of (rows x D) with (D x keys), or of that size, for each head."""

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*u1", torch.int64: "*i64",
}  # fmt: skip


class H200:
    """Published figures, and what follows from them; no measurement."""

    MULTIPROCESSORS = 132
    BFLOAT16, FLOAT32, BYTES = 989e12, 67e12, 4.8e12
    CLOCK = FLOAT32 / (MULTIPROCESSORS * 128 * 2)  # 128 lanes, two operations each
    EXPONENTIALS = FLOAT32 / 2 / 8  # 16 special function units beside 128 lanes
    REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 228 * 2**10  # of a multiprocessor


class Call(NamedTuple):
    """Attention of `runs` x 100 queries or relevance of them, or an encoder's where `runs` is None."""

    name: str
    runs: int | None
    dtypes: tuple[torch.dtype, ...]


BOTH = (torch.bfloat16, torch.float32)
ATTENTION = [
    Call("cross, 9 runs", 9, BOTH),
    Call("cross, 256 runs", 256, BOTH[:1]),  # in float32 tiles do not depend on it
    Call("encoder", None, BOTH),
]
RELEVANCE = [Call(f"cross, {PAIRS} maps", 9, BOTH[1:]), Call(f"encoder, {PAIRS} maps", None, BOTH[1:])]


@dataclass
class Launch:
    """A kernel as the package would launch it. `arguments`: all, by name."""

    kernel: str
    call: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands for a module of kernels and keeps what would be launched."""

    INTERPRETED = True  # so that no GPU is asked for

    def __init__(self, family: str, call: str, dtype: torch.dtype) -> None:
        self.family, self.call, self.dtype = family, call, dtype
        self.launches: list[Launch] = []

    def __getattr__(self, kernel: str) -> _Grids:
        return _Grids(self, kernel)


class _Grids:
    def __init__(self, recorder: Recorder, kernel: str) -> None:
        self.recorder, self.kernel = recorder, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            recorder = self.recorder
            name = f"{recorder.family}.{self.kernel}"
            arguments = dict(zip(kernel_of(name).arg_names, given, strict=False)) | named
            settings = ("num_warps", "num_stages", "enable_fp_fusion")
            options = {option: arguments.pop(option) for option in settings if option in arguments}
            recorder.launches.append(Launch(name, recorder.call, recorder.dtype, grid, arguments, options))

        return launch


def kernel_of(name: str) -> Any:
    from headoff.attention import triton_kernels
    from headoff.relevance import fused_kernels

    family, kernel = name.split(".")
    return getattr({"attention": triton_kernels, "relevance": fused_kernels}[family], kernel)


def attention_launches(call: Call, channels: int, settings: argparse.Namespace) -> Iterator[Launch]:
    """Of a forward and a backward pass; gates are one a row and laid out as the decoder does."""
    rows = KEYS if call.runs is None else call.runs * QUERIES

    def tilings(query: Tensor, key: Tensor) -> fused.Tilings:
        return fused.Tilings(*[changed(tiling, settings) for tiling in chosen(query, key)])

    chosen = fused.tilings
    for dtype in call.dtypes:
        recorder = Recorder("attention", call.name, dtype)
        query, key, value = (
            torch.zeros(1, length, HEADS, channels, dtype=dtype).transpose(1, 2).requires_grad_()
            for length in (rows, KEYS, KEYS)
        )
        gate = None if call.runs is None else torch.ones(rows, HEADS, dtype=dtype).T[None, :, :, None]
        mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool) if settings.padded else None
        with patch.object(fused, "_kernels", return_value=recorder), patch.object(fused, "tilings", tilings):
            context = fused.triton_attention(
                query, key, value, mask, head_gate=gate, precision=settings.precision
            )
            torch.autograd.grad(context, (query, key, value), torch.zeros_like(context))
        yield from recorder.launches


def relevance_launches(call: Call, channels: int, settings: argparse.Namespace) -> Iterator[Launch]:
    """Of cams with gradients, and for the encoder of products with cams, all pairs in one launch."""
    runs, rows = (1, KEYS) if call.runs is None else (call.runs, QUERIES)
    query = torch.empty(runs, HEADS, rows, channels, device="meta")
    key = torch.empty(1, HEADS, KEYS, channels, device="meta")
    mask = torch.empty(KEYS, dtype=torch.bool, device="meta") if settings.padded else None
    record = AttentionRecord(AttentionAddress("encoder_self", 0), query, key, key, None, mask, query)
    recorder = Recorder("relevance", call.name, torch.float32)
    chosen = fused_vjp.tiling
    with (
        patch.object(fused_vjp, "_kernels", return_value=recorder),
        patch.object(fused_vjp, "tiling", lambda channels: changed(chosen(channels), settings)),
    ):
        vjp = fused_vjp.FusedVjp(record, "gradient", tile=2**40, precision=settings.precision)
        gradient = query.new_empty(PAIRS, *query.shape[1:])
        of_pairs = torch.empty(PAIRS, dtype=torch.int64, device="meta")
        vjp(gradient, of_pairs)
        if call.runs is None:
            vjp.right(gradient, of_pairs, query.new_empty(PAIRS, KEYS))
            vjp.left(gradient, of_pairs, query.new_empty(PAIRS, LAYERS, rows))
    yield from recorder.launches


def changed(tiling: AnyTiling, settings: argparse.Namespace) -> AnyTiling:
    """A tiling with what the command line says otherwise."""
    rows, keys = settings.tile or tiling[:2]
    return type(tiling)(rows, keys, settings.warps or tiling.warps, settings.stages or tiling.stages)


class Resources(NamedTuple):
    """Registers and spilled bytes of a thread, shared bytes of a program."""

    registers: int
    spilled: int
    shared: int


def compiled(launch: Launch, capability: int, cuobjdump: str) -> Resources:
    """What the kernel takes that Triton would compile for `launch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel_of(launch.kernel), *specialised(launch))
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [cuobjdump, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return Resources(int(numbers["REG"]), int(numbers["STACK"]), binary.metadata.shared)


def specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes: numbers that are 1, or multiples of 16, are known to the compiler.

    As are addresses, for torch allocates at multiples of 512 bytes.
    """
    types, constants, attributes = {}, {}, {}

    def type_of(place: tuple[int, ...], parameter: Any, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of((*place, index), parameter, each) for index, each in enumerate(value))
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


class Estimate(NamedTuple):
    """Of one launch on an H200, by arithmetic. Times in microseconds, by what would take them."""

    operations: float
    moved: int
    programs: int
    held: int
    times: dict[str, float]


def estimate(launch: Launch, resources: Resources, step_cycles: float) -> Estimate:
    arguments, warps = launch.arguments, launch.options["num_warps"]
    query, keys = arguments["query"], arguments["length"]
    pairs = len(arguments["runs"]) if "runs" in arguments else len(query)
    scores = pairs * query.shape[1] * query.shape[2] * keys
    operations = 2.0 * PRODUCTS[launch.kernel] * scores * query.shape[3]
    moved = sum(bytes_of(each) for each in arguments.values() if isinstance(each, Tensor))
    of_registers = H200.REGISTERS // (-(-resources.registers // 8) * 8 * 32 * warps)
    of_shared = H200.SHARED // (resources.shared + 2**10)  # of which each program loses 1 KiB
    held = min(of_registers, of_shared, H200.WARPS // warps, H200.PROGRAMS)
    programs = math.prod(launch.grid)
    waves = -(-programs // (held * H200.MULTIPROCESSORS))
    times = {
        "products": operations / products_rate(launch),
        "exp": scores / H200.EXPONENTIALS,
        "memory": moved / H200.BYTES,
        "chain": waves * steps(launch) * step_cycles / H200.CLOCK,
    }
    return Estimate(
        operations, moved, programs, held, {name: seconds * 1e6 for name, seconds in times.items()}
    )


def products_rate(launch: Launch) -> float:
    """Floating-point operations a second of its products."""
    if launch.dtype == torch.bfloat16:
        return H200.BFLOAT16
    rates = {"ieee": H200.FLOAT32, "tf32": H200.BFLOAT16 / 2, "tf32x3": H200.BFLOAT16 / 6}
    return rates[launch.arguments["PRECISION"]]


def bytes_of(tensor: Tensor) -> int:
    """Bytes that are really there, of a tensor that may be expanded."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride)


def steps(launch: Launch) -> int:
    """Steps of a program's loops, one after another."""
    arguments = launch.arguments
    rows = -(-arguments.get("share", arguments["queries"]) // arguments["BLOCK_Q"])
    keys = -(-arguments["length"] // arguments["BLOCK_K"])
    return {
        "attention.forward_kernel": keys,
        "attention.query_gradient_kernel": keys,
        "attention.key_value_gradient_kernel": rows,
        "relevance.cam_kernel": HEADS,
        "relevance.key_value_gradient_kernel": rows,
        "relevance.right_kernel": HEADS,
        "relevance.left_kernel": HEADS * rows,
    }[launch.kernel]


def labels(launch: Launch) -> list[str]:
    """What tells a launch from the others."""
    arguments, precision = launch.arguments, launch.arguments["PRECISION"]
    dtype = (
        "bf16"
        if launch.dtype == torch.bfloat16
        else "fp32" + ("" if precision == "ieee" else f", {precision}")
    )
    tile = f"{arguments['BLOCK_Q']}x{arguments['BLOCK_K']}x{arguments['CHANNELS']}"
    return [launch.kernel.removesuffix("_kernel"), launch.call, dtype, tile]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def compiler_row(launch: Launch, found: dict[int, Resources]) -> list[str]:
    options = launch.options
    return [
        *labels(launch), str(options["num_warps"]), str(options["num_stages"]),
        " / ".join(str(each.registers) for each in found.values()),
        " / ".join(str(each.spilled) for each in found.values()),
        " / ".join(f"{each.shared / 2**10:.1f}" for each in found.values()),
    ]  # fmt: skip


def arithmetic_row(launch: Launch, resources: Resources, step_cycles: float) -> list[str]:
    expected = estimate(launch, resources, step_cycles)
    times = expected.times
    longest_first = sorted(times, key=times.__getitem__, reverse=True)
    return [
        *labels(launch), str(expected.programs), str(expected.held),
        f"{expected.operations / 1e9:.3g}", f"{expected.moved / 1e6:.3g}",
        *(f"{time:.2g}" if time < 10 else f"{time:.0f}" for time in times.values()),
        ", ".join(name for name in longest_first if 2 * times[name] >= times[longest_first[0]]),
    ]  # fmt: skip


def missing() -> str | None:
    """Why nothing can be compiled, as a sentence; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install it with 'pip install triton'."
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it."
    try:
        tools = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError) as error:
        return f"Triton has no CUDA tools here ({error}): install a build of it for NVIDIA GPUs."
    absent = [tool for tool in tools if not Path(tool).exists()]
    return f"{absent[0]} does not exist: install Triton anew." if absent else None


def tile_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no tile: write rows and keys, as in 64x32")
    return int(match[1]), int(match[2])


def arguments_of(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="heads of 32, 64 and 128 channels (default: 32)")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose names contain this")
    parser.add_argument("--padded", action="store_true", help="with a mask that hides padding")
    parser.add_argument("--tile", type=tile_of, metavar="ROWSxKEYS", help="default: what the package chooses")
    parser.add_argument("--warps", type=int, help="of a program; default: what the package chooses")
    parser.add_argument("--stages", type=int, help="of a pipeline; default: what the package chooses")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32", "tf32x3"), default="ieee", help="of float32 (default: ieee)"
    )
    parser.add_argument(
        "--step-cycles", type=float, default=1000, help="of one step of a loop, assumed (default: 1000)"
    )
    return parser.parse_args(command_line)


def main() -> int:
    settings = arguments_of()
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    import triton

    launches = [
        launch
        for channels in ((32, 64, 128) if settings.all else (32,))
        for calls, record in ((ATTENTION, attention_launches), (RELEVANCE, relevance_launches))
        for call in calls
        for launch in record(call, channels, settings)
        if settings.only in launch.kernel
    ]
    by_compiler, by_arithmetic = [], []
    for number, launch in enumerate(launches, 1):
        print(f"{number} of {len(launches)}: {', '.join(labels(launch))}", file=sys.stderr, flush=True)
        found = {each: compiled(launch, each, triton.knobs.nvidia.cuobjdump.path) for each in ARCHITECTURES}
        by_compiler.append(compiler_row(launch, found))
        by_arithmetic.append(arithmetic_row(launch, found[90], settings.step_cycles))

    which = ["kernel", "call", "dtype", "rows x keys x D"]
    print(f"Compiled by Triton {triton.__version__}, sm_80 / sm_90:\n")
    print(markdown([*which, "warps", "stages", "registers", "spilled, B", "shared, KiB"], by_compiler))
    print("\nArithmetic for an H200 with all heads on, no measurement; times in microseconds:\n")
    head = ["programs", "held by one SM", "GFLOP", "MB", "products", "exp", "memory", "chain", "bound by"]
    print(markdown([*which, *head], by_arithmetic))
    return 0


if __name__ == "__main__":
    sys.exit(main())
