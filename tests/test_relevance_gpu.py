"""The backward passes for accelerators: all pairs together, in plain PyTorch and in Triton's kernels.

The truth for both is the tile-by-tile implementation in float64, which tests/test_relevance_engine.py compares with the
oracle. Plain PyTorch must agree with it up to float64 rounding; the kernels, in Triton's interpreter, up to float32
rounding. TRITON_INTERPRET must be set before Triton is imported, so tests that need the interpreter run this file in a
separate process (`BODIES`, at the end). On a GPU the same functions run there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from relevance_examples import (
    QUERIES,
    TARGETS,
    assert_matches_oracle,
    engine_results,
    features_of,
    random_gates,
    tiny_detector,
)
from torch import Tensor

from headoff.attention import eager, sdpa
from headoff.detr.detector import Features
from headoff.errors import SettingError
from headoff.gates import first_off, none_off, stack
from headoff.relevance import (
    MEMORY_BUDGET,
    EngineMethod,
    RelevanceEngine,
    cam_method_names,
    class_logit,
    fused_vjp,
    resolve_method,
)
from headoff.relevance import kernels as kernels_module
from headoff.relevance.attention_vjp import AttentionVjp, is_builtin
from headoff.relevance.engine import TargetGradients, _Pair
from headoff.relevance.memory import default_memory_budget
from headoff.relevance.methods import resolve_cam_method
from headoff.relevance.records import AttentionRecord
from headoff.relevance.trace import DecoderTrace

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="there is no CUDA device here, or TRITON_INTERPRET=1 keeps kernels off it",
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def example(
    runs: int, runs_of_keys: int, *, masked: bool = False, pairs: int = 4, queries: int = 70, keys: int = 37
) -> tuple[AttentionRecord, Tensor, Tensor]:
    """A call of 2 heads of 5 channels in float64, the contexts' gradients of some pairs, and the pairs' runs.

    Gates are on, off and in between; head 0 of run 0 is off. Of the last pair the first 64 rows see nothing.
    """
    generator = torch.Generator().manual_seed(runs + runs_of_keys + masked)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (
        draw(runs, 2, queries, 5),
        draw(runs_of_keys, 2, keys, 5),
        draw(runs_of_keys, 2, keys, 5),
    )
    gate = torch.tensor([0.0, 0.3, 1.0, 1.0]).double()[
        torch.randint(4, (runs, 2, queries, 1), generator=generator)
    ]
    gate[0, 0] = 0
    mask = torch.rand(keys, generator=generator) > 0.3 if masked else None
    context = eager(
        query,
        key.expand(runs, -1, -1, -1),
        value.expand(runs, -1, -1, -1),
        None if mask is None else mask[None, None, None],
        head_gate=gate,
    )
    gradient = draw(pairs, 2, queries, 5)
    gradient[-1, :, :64] = 0
    of_pairs = torch.randint(runs, (pairs,), generator=generator)
    of_pairs[0] = 0
    return AttentionRecord(("decoder_cross", 0), query, key, value, gate, mask, context), gradient, of_pairs


def in_float32(record: AttentionRecord, device: str = "cpu") -> AttentionRecord:
    def single(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, torch.float32)

    tensors = (single(tensor) for tensor in (record.query, record.key, record.value, record.gate))
    keys = None if record.keys is None else record.keys.to(device)
    return AttentionRecord(record.address, *tensors, keys, single(record.context))


SHAPES = [(3, 3), (3, 1), (1, 1)]
"""Runs, and runs of the keys: self-attention and cross-attention of a decoder, and an encoder."""


def everything(
    vjp: AttentionVjp, gradient: Tensor, runs: Tensor, vectors: Tensor, rows: Tensor
) -> list[Tensor]:
    """Cams, gradients of query, key and value, and both products with cams."""
    wanted = vjp.rule != "attention"
    cams, inputs = vjp(gradient, runs, inputs=wanted)
    assert cams is not None
    return [cams, *(inputs or ()), vjp.right(gradient, runs, vectors), vjp.left(gradient, runs, rows)]


# Plain PyTorch.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("runs", "runs_of_keys"), SHAPES)
@pytest.mark.parametrize("rule", ["gradient", "centred", "attention", "gradcam"])
def test_all_pairs_at_once_is_one_by_one(rule, runs, runs_of_keys, masked):
    """For every size of tiles (one row of a head of a pair, a few heads, everything), with weights stored or not."""
    record, gradient, of_pairs = example(runs, runs_of_keys, masked=masked)
    vectors, rows = torch.randn(4, 37).double(), torch.randn(4, 3, 70).double()
    expected = everything(AttentionVjp(record, rule), gradient, of_pairs, vectors, rows)
    torch.testing.assert_close(expected[-2], (expected[0] @ vectors[:, :, None])[:, :, 0])
    torch.testing.assert_close(expected[-1], rows @ expected[0])
    for kept in (False, True):
        if kept:
            record.keep_weights()
        for tile in (37, 37 * 70, 37 * 70 * 4, 2**26):
            found = everything(
                AttentionVjp(record, rule, tile=tile, batched=True), gradient, of_pairs, vectors, rows
            )
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory_budget", [1, 2**30])
@pytest.mark.parametrize("name", cam_method_names())
def test_every_method_agrees_with_the_oracle(name, memory_budget):
    detector = tiny_detector(1, decoder_layers=2)
    features = features_of(detector, padded=True)
    gates = random_gates(detector, 3, per_query=True, seed=4)
    options = {"method": name, "memory_budget": memory_budget, "kernels": "torch", "specs": TARGETS[:2]}
    assert assert_matches_oracle(detector, features, gates, **options)


def test_a_small_budget_divides_the_work_and_keeps_nothing():
    detector = tiny_detector(0)
    features = features_of(detector)
    small, large = (
        RelevanceEngine(detector, features, kernels="torch", memory_budget=budget).memory
        for budget in (1, 2**30)
    )
    assert large.keep_cams and large.keep_weights and large.pairs_at_once == 256
    assert not small.keep_cams and not small.keep_weights and small.pairs_at_once == 1
    assert small.tile < large.tile < 2**30 / 8


LRP = ("chefer_lrp", "transformer_attribution", "partial_lrp", "attn_lrp")


def test_nothing_is_read_between_gradient_and_map():
    """With tensors without values, reading a value and mixing devices are errors."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    detector = tiny_detector(0, decoder_layers=2, encoder_layers=1)
    features, gates = features_of(detector, padded=True), random_gates(detector, 3)
    for name in ("chefer", "chefer_centred", "rollout", "attention_gradcam", *LRP):
        method = resolve_method(name)
        for keep in (False, True):
            make = method.engine if isinstance(method, EngineMethod) else RelevanceEngine
            engine = make(detector, features, method=method, kernels="torch")
            engine.memory.keep_cams = engine.memory.keep_weights = keep
            encoder = engine.encode()
            decoder = engine._run_decoder(encoder, gates)
            with fake.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                on_gpu = elsewhere((encoder, decoder, features), mode, torch.device("cuda", 0))
                engine.features = on_gpu[2]
                seed = torch.empty(4, QUERIES, detector.config.width, dtype=torch.float64, device="cuda:0")
                some = torch.empty(4, dtype=torch.long, device="cuda:0")
                gradients = TargetGradients(seed, seed, seed)
                engine._of_states = lambda *_, seed=seed: seed  # the heads are not on the GPU
                rows, differs = engine._backward(on_gpu[0], on_gpu[1], gradients, some, some, some[:2])
                assert rows.rows.shape == (4, 2, 15) and differs.device.type == "cuda"


def elsewhere(thing, mode, device):
    """A copy of a tree of objects, with fake tensors on a device that need not exist."""
    if isinstance(thing, Tensor):
        return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=device)
    if isinstance(thing, (list, tuple)) and type(thing) in (list, tuple):
        return type(thing)(elsewhere(tensor, mode, device) for tensor in thing)
    if type(thing).__module__.startswith("headoff.") and hasattr(thing, "__dict__"):
        copy = object.__new__(type(thing))
        copy.__dict__.update({name: elsewhere(each, mode, device) for name, each in vars(thing).items()})
        return copy
    return thing


# What is chosen.


def test_the_device_chooses():
    detector = tiny_detector(0)
    features = features_of(detector)
    assert RelevanceEngine(detector, features).kernels == "tiles"
    assert RelevanceEngine(detector, features, kernels="torch").kernels == "torch"
    assert default_memory_budget(torch.device("cpu")) == MEMORY_BUDGET


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float64, {"kernels": "triton"}, "compute in float32, not float64.*'auto'"),
        (torch.float32, {"kernels": "triton", "method": "rollout"}, "gradient and centred, not attention"),
        (
            torch.float32,
            {"kernels": "fused"},
            "kernels cannot be 'fused': use one of auto, tiles, torch, triton",
        ),
        (torch.float32, {"precision": "tf32"}, "precision 'tf32' is for the Triton kernels.*'tiles'"),
        (torch.float32, {"precision": "half"}, "precision cannot be 'half'"),
    ],
)
def test_what_cannot_be_is_said(dtype, options, message):
    detector = tiny_detector(0, dtype)
    with pytest.raises(SettingError, match=message):
        RelevanceEngine(detector, features_of(detector), **options)


@needs_triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter there are kernels"
)
def test_kernels_are_refused_where_there_are_none():
    detector = tiny_detector(0, torch.float32)
    with pytest.raises(SettingError, match="run on CUDA, not on cpu"):
        RelevanceEngine(detector, features_of(detector), kernels="triton")


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_triton_has_to_be_asked_for(monkeypatch, kernels):
    """On a fake CUDA device, on which nothing is computed."""
    monkeypatch.setattr(kernels_module, "unsupported", lambda *_: None)
    detector = SimpleNamespace(device=torch.device("cuda", 0), config=tiny_detector(0).config)
    chosen = partial(kernels_module.chosen_kernels, detector=detector, compute=torch.float32)
    assert chosen(kernels, method=resolve_cam_method("chefer")) == "torch"
    assert chosen("triton", method=resolve_cam_method("chefer")) == "triton"


@needs_triton
def test_launches_that_fail_are_said_in_a_sentence(monkeypatch):
    class OutOfResources(Exception):
        pass

    def failing(*_, **__):
        raise OutOfResources("out of resource: shared memory,\n Required: 300000")

    record, gradient, of_pairs = example(1, 1)
    grids = type("Grids", (), {"__getitem__": lambda self, grid: failing})()
    monkeypatch.setattr(fused_vjp, "unsupported", lambda *_: None)
    monkeypatch.setattr(fused_vjp, "_kernels", lambda: SimpleNamespace(cam_kernel=grids))
    vjp = fused_vjp.FusedVjp(in_float32(record), "gradient")
    with pytest.raises(
        SettingError, match="cam_kernel on cpu .OutOfResources: out of resource: shared memory, Req"
    ):
        vjp(gradient.float(), of_pairs)


def test_the_kernels_do_not_support_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(fused_vjp, "unsupported_gpu", lambda device: "too old")
    if importlib.util.find_spec("triton") is not None:
        reason = fused_vjp.unsupported(torch.device("cuda", 0), torch.float32, "gradient", 32)
        assert reason == "the relevance kernels do not support cuda:0 (too old)"


def test_builtins_are_known_by_their_module():
    def patch(query, key, value, attn_mask=None):
        return eager(query, key, value, attn_mask)

    assert is_builtin(eager) and is_builtin(sdpa)
    assert not is_builtin(patch)
    detector = tiny_detector(0)
    detector.attention = patch
    assert not is_builtin(detector.attention), "what adapts a patch is this package's, the patch is not"


# Triton's kernels.


@pytest.mark.skipif(triton_interpreter.problem() is not None, reason=str(triton_interpreter.problem()))
def test_under_the_interpreter(tmp_path):
    """What the functions below raise in Triton's interpreter; they share one separate process."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    answer = tmp_path / "raised.json"
    done = subprocess.run(
        [sys.executable, __file__, str(answer)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    raised = json.loads(answer.read_text())
    assert raised == dict.fromkeys(BODIES, ""), raised


@needs_cuda
@needs_triton
@pytest.mark.parametrize("name", ["kernels", "engine", "launches", "waits"])
def test_on_cuda(name):
    with torch.no_grad():
        BODIES[name]("cuda")


@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device here")
def test_on_a_device_that_is_not_the_current_one():
    with torch.no_grad():
        BODIES["kernels"]("cuda:1")
    assert torch.cuda.current_device() == 0


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_ahead_of_time(arch):
    """Kernels compile to machine code, with and without optional arguments; this needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from headoff.relevance import fused_kernels
    from headoff.relevance.fused_vjp import tiling

    tiles = tiling(32)
    constants = {
        "CHANNELS": 32,
        "BLOCK_D": 32,
        "BLOCK_Q": tiles.rows,
        "BLOCK_K": tiles.keys,
        "BLOCK_M": 16,
        "PRECISION": "ieee",
    }
    types = {"runs": "*i64", "mask": "*i1", "scale": "fp32"}
    types |= dict.fromkeys(("layers", "share", "heads", "queries", "length"), "i32")
    for name in ("cam_kernel", "key_value_gradient_kernel", "right_kernel", "left_kernel"):
        kernel = getattr(fused_kernels, name)
        left_out = ("mask", "threshold", "cam") if arch == 80 else ()
        known = {**constants, "KEYS_BY_RUN": arch == 80, **dict.fromkeys(left_out)}
        known = {name: value for name, value in known.items() if name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in known else types.get(name, "*fp32") for name in kernel.arg_names
        }
        compiled = compile(
            ASTSource(kernel, signature, known),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": tiles.warps,
                "num_stages": tiles.stages,
                "enable_fp_fusion": True,
            },
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 48 * 2**10, "more than every device has without being asked"


def float32_budget(record: AttentionRecord) -> float:
    """The allowed rounding error of a call in float32, relative to its largest result.

    Each term of a sum rounds once, by the worst of luck all in one direction: D of a score, whose error is the
    relative one of its exponential, and as many as there are rows or keys in a gradient. That it is no licence is
    shown by `assert_rejected`.
    """
    magnitude = float((record.scaled_query.abs() @ record.key.abs().mT).max())
    terms = record.query.shape[-1] * magnitude + max(record.query.shape[2], record.key.shape[2])
    return terms * torch.finfo(torch.float32).eps


def assert_rejected(record: AttentionRecord, gradient: Tensor, runs: Tensor, expected: Tensor) -> None:
    """Cams of products in TF32, and cams of the next pair, exceed the allowed error."""

    def rounded(x: Tensor) -> Tensor:
        return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    operands = [rounded(tensor) for tensor in (record.query, record.key, record.value)]
    coarse = AttentionRecord(record.address, *operands, record.gate, record.keys, record.context)
    of_tf32, _ = AttentionVjp(coarse, "gradient")(rounded(gradient), runs, inputs=False)
    for wrong in (of_tf32, expected.roll(1, 0)):
        assert relative(wrong, expected) > 10 * float32_budget(record)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def kernels(device: str = "cpu") -> None:
    from headoff.relevance.fused_vjp import FusedVjp

    for rule in ("gradient", "centred"):
        for runs, runs_of_keys in SHAPES:
            record, gradient, of_pairs = example(runs, runs_of_keys, masked=runs == runs_of_keys, pairs=3)
            vectors, rows = torch.rand(3, 37).double(), torch.rand(3, 3, 70).double()
            expected = everything(AttentionVjp(record, rule), gradient, of_pairs, vectors, rows)
            single = in_float32(record, device)
            given = [
                tensor.to(device) for tensor in (gradient.float(), of_pairs, vectors.float(), rows.float())
            ]
            found = everything(FusedVjp(single, rule), *given)
            budget = float32_budget(record)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == torch.float32
                worst = relative(ours.cpu(), theirs)
                assert worst < budget, f"{rule}, {runs} runs, {runs_of_keys} of keys: {worst} of {budget}"
            if rule == "gradient":
                assert_rejected(record, gradient, of_pairs, expected[0])
            # Cams are the same numbers however they are asked for: alone, or on the way to gradients.
            assert FusedVjp(single, rule)(*given[:2], inputs=False)[0].equal(found[0])
            found = [tensor.cpu() for tensor in found]
            # What is off, or hidden, or seen by nobody, is exactly zero.
            assert found[0][-1, :64].eq(0).all()
            off = of_pairs == 0
            assert (
                found[1][off, 0].eq(0).all() and found[2][off, 0].eq(0).all() and found[3][off, 0].eq(0).all()
            )
            if record.keys is not None:
                assert found[0][:, :, ~record.keys].eq(0).all() and found[2][:, :, ~record.keys].eq(0).all()


def launches(device: str = "cpu") -> None:
    """Pairs divided among launches, and heads of more channels, which have other tiles; NaN is not lost."""
    from headoff.relevance.fused_vjp import FusedVjp, tiling

    record, gradient, of_pairs = example(3, 1, queries=20, keys=70)
    record, gradient, of_pairs = in_float32(record, device), gradient.float().to(device), of_pairs.to(device)
    vectors, rows = torch.rand(4, 70, device=device), torch.rand(4, 2, 20, device=device)
    whole, divided = (
        everything(FusedVjp(record, "gradient", tile=tile), gradient, of_pairs, vectors, rows)
        for tile in (2**20, 1)
    )
    assert all(one.equal(other) for one, other in zip(whole, divided, strict=True))

    gradient[1, 1, 3, 2] = torch.nan
    cams, inputs = FusedVjp(record, "gradient")(gradient, of_pairs)
    found = [tensor.isnan().flatten(1).any(1) for tensor in (cams, *inputs)]
    assert all(tensor.tolist() == [False, True, False, False] for tensor in found)

    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(1, 1, n, 40, generator=generator).double() for n in (40, 33, 33, 40)
    )
    assert tiling(40) != tiling(5)
    record = AttentionRecord(("encoder_self", 0), query, key, value, None, None, eager(query, key, value))
    runs = torch.zeros(1, dtype=torch.long)
    vectors, rows = torch.rand(1, 33).double(), torch.rand(1, 1, 40).double()
    expected = everything(AttentionVjp(record, "gradient"), gradient, runs, vectors, rows)
    given = [tensor.to(device) for tensor in (gradient.float(), runs, vectors.float(), rows.float())]
    found = everything(FusedVjp(in_float32(record, device), "gradient"), *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours.cpu(), theirs) < float32_budget(record)


def engine(device: str = "cpu") -> None:
    """The whole engine on the kernels, as near to float64's truth as another way back in float32 on that device."""
    for padded, options in ((True, {}), (False, {"memory_budget": 1}), (True, {"method": "chefer_centred"})):
        detector = tiny_detector(2, encoder_layers=1, decoder_layers=2, feedforward=8)
        features = features_of(detector, padded=padded)
        gates = stack([none_off(), first_off(2)], detector.head_layout)
        truth = engine_results(detector, features, gates, specs=TARGETS[:2], **options)
        single = single_features(features, device)
        detector.float().to(device)
        assert RelevanceEngine(detector, single, kernels="triton").kernels == "triton"
        plain_kernels = "tiles" if device == "cpu" else "torch"
        tiles = engine_results(detector, single, gates, specs=TARGETS[:2], kernels=plain_kernels, **options)
        fused = engine_results(detector, single, gates, specs=TARGETS[:2], kernels="triton", **options)
        for expected, plain, found in zip(sum(truth, []), sum(tiles, []), sum(fused, []), strict=True):
            largest = float(expected.rows.max())
            floor = largest * torch.finfo(torch.float32).eps * detector.config.width
            if device != "cpu":
                floor *= 8  # a GPU's exponentials are good to 2 units, not to half of one
            allowed = 4 * float((plain.rows - expected.rows).abs().max()) + floor
            worst = float((found.rows - expected.rows).abs().max())
            assert worst <= allowed < 1e-3 * largest, f"{worst} of {allowed}, maximum {largest} ({options})"
            assert found.decoder_identity_rows.equal(expected.decoder_identity_rows)
            assert found.encoder_identity_rows == expected.encoder_identity_rows


def single_features(features: Features, device: str) -> Features:
    mask = None if features.attn_mask is None else features.attn_mask.to(device)
    tokens, positions = (tensor.to(device, torch.float32) for tensor in (features.tokens, features.positions))
    return Features(tokens, positions, mask, features.grid)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Within this context, making the host wait for the GPU is an error; on a CPU it has no effect."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def waits(device: str = "cpu") -> None:
    """From targets to maps, nothing makes the host wait, after a first call that compiles kernels and loads
    libraries.
    """
    detector = tiny_detector(0, torch.float32, encoder_layers=1, decoder_layers=2, feedforward=8).to(device)
    features = single_features(features_of(detector.cpu(), padded=True), device)
    detector.to(device)
    gates = random_gates(detector, 2, sites=("decoder_self", "decoder_cross"))
    cases = [("chefer", "triton"), ("chefer_centred", "triton"), ("chefer", "torch"), ("rollout", "torch")]
    for method, kernels in cases if device != "cpu" else cases[:1]:
        for keep in (False, True):
            engine = RelevanceEngine(detector, features, method=method, kernels=kernels)
            engine.memory.keep_cams = keep
            encoder = engine.encode()
            decoder = DecoderTrace.run(detector, encoder.memory, gates, engine._make_vjp)
            pairs = [_Pair(run, 0, class_logit(query, 1)) for run, query in ((0, 1), (1, 2))]
            runs, queries, layers = (
                torch.tensor(indices, device=device) for indices in ([0, 1], [1, 2], [0, 1])
            )
            maps = []
            for guard in (nullcontext(), no_waiting(device)):
                with guard:
                    _, seed = engine._target_gradients(decoder, pairs)
                    seed = seed if engine.method.needs_gradient else None
                    found, _ = engine._backward(encoder, decoder, seed, runs, queries, layers)
                maps.append(found.rows.cpu())
            assert maps[0].equal(maps[1]) and maps[0].isfinite().all() and maps[0].any()


BODIES = {"kernels": kernels, "launches": launches, "engine": engine, "waits": waits}

if __name__ == "__main__":
    triton_interpreter.patch_language_once_a_launch()
    raised = dict.fromkeys(BODIES, "")
    for name, body in BODIES.items():
        try:
            with torch.no_grad():
                body()
        except Exception:
            raised[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(raised))
