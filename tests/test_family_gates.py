"""Gates of detectors of transformers: what they switch off, and what they never reach."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from family_examples import (
    CLASSES,
    IN_FLOAT64,
    KINDS,
    LAYERS,
    QUERIES,
    batch,
    folder_of,
    gates_at,
    loaded,
)

from headoff.choices import SITES
from headoff.detections import detections_from
from headoff.family.adapter import find_adapter
from headoff.gates import Gates, heads_off, parse_configuration, single_heads, stack

transformers = pytest.importorskip("transformers")

HEAD, LAYER = 1, 1
TWO_STAGE = ("deformable_detr two-stage", "rt_detr", "rt_detr_v2", "d_fine", "lw_detr", "rf_detr")


def has(kind, site):
    return site != "encoder_self" or kind not in ("lw_detr", "rf_detr")


PLACES = [(kind, site) for kind in KINDS for site in SITES if has(kind, site)]


def dtype_of(kind):
    return torch.float64 if kind in IN_FLOAT64 else torch.float32


def tolerance_of(kind):
    return 1e-9 if kind in IN_FLOAT64 else 2e-5


def encoded(kind):
    """A detector and the memory of two images, the second one padded."""
    detector = loaded(kind, dtype_of(kind))
    return detector, detector.encode(*batch(detector.dtype))


def under(detector, memory, gates, pixels=None):
    """Logits and boxes under one configuration, also of the encoder."""
    if gates.encoder_self is not None:
        memory = detector.encode(*batch(detector.dtype), gate=gates.encoder_self[0])
        gates = Gates(gates.names)
    output = detector.decode(memory, gates)
    return torch.cat((output.logits[0], output.boxes[0]), -1)


def modules_at(kind, model, site):
    adapter = find_adapter(kind.partition(" ")[0])
    return {
        "encoder_self": adapter.encoder_attention,
        "decoder_self": adapter.decoder_self,
        "decoder_cross": adapter.decoder_cross,
    }[site](model)


@contextmanager
def zeroed(kind, model, site, heads_at_site):
    """transformers' model in which a head's part of the output projection's input has no effect."""
    module = modules_at(kind, model, site)[LAYER]
    for name in ("o_proj", "out_proj", "output_proj"):
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear):
            width = projection.in_features // heads_at_site
            kept = projection.weight.data.clone()
            projection.weight.data[:, HEAD * width : (HEAD + 1) * width] = 0
            yield
            projection.weight.data.copy_(kept)
            return
    # D-FINE has no projection: the head's channels of its output are 0.

    def clear(_, args, output):
        context = output[0] if isinstance(output, tuple) else output
        width = context.shape[-1] // heads_at_site
        context = context.clone()
        context[..., HEAD * width : (HEAD + 1) * width] = 0
        return (context, *output[1:]) if isinstance(output, tuple) else context

    handle = module.register_forward_hook(clear)
    yield
    handle.remove()


@pytest.mark.parametrize(("kind", "site"), PLACES)
@torch.no_grad()
def test_a_gate_of_0_is_a_head_without_columns_in_the_output_projection(kind, site):
    dtype = dtype_of(kind)
    detector, memory = encoded(kind)
    attention = "sdpa" if kind == "lw_detr" else "eager"
    model = transformers.AutoModelForObjectDetection.from_pretrained(
        folder_of(kind), dtype=dtype, attn_implementation=attention
    )
    pixels, mask = batch(dtype)
    before = model(pixels, pixel_mask=mask.long())
    with zeroed(kind, model, site, detector.head_layout.heads_at(site)):
        theirs = model(pixels, pixel_mask=mask.long())
    assert (theirs.logits - before.logits).abs().max() > 1e-6  # the head matters
    ours = under(detector, memory, gates_at(detector, site, 0.0, layers=LAYER, heads=HEAD))
    expected = torch.cat((theirs.logits, theirs.pred_boxes), -1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance_of(kind))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_configurations_in_one_batch_are_what_each_is_alone(kind):
    detector, memory = encoded(kind)
    layout = detector.head_layout
    configurations = [
        heads_off(),
        *single_heads(LAYERS, layout.heads)[:3],
        heads_off(0, site="decoder_self"),
        heads_off(0, 2).for_queries(3) & heads_off(1, layers=[1], site="decoder_self").for_queries(0, 5),
        heads_off(*range(layout.heads)),
    ]
    configurations = [c.named(str(index)) for index, c in enumerate(configurations)]
    together = detector.decode(memory, stack(configurations, layout))
    for index, configuration in enumerate(configurations):
        alone = detector.decode(memory, configuration)
        for ours, expected in ((together.logits, alone.logits), (together.boxes, alone.boxes)):
            torch.testing.assert_close(ours[index], expected[0], rtol=0, atol=tolerance_of(kind))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_gate_of_a_query_reaches_other_queries_only_through_self_attention(kind):
    detector, memory = encoded(kind)
    before = under(detector, memory, gates_at(detector, "decoder_cross", 1.0))
    others = [query for query in range(QUERIES) if query != 2]
    last = gates_at(detector, "decoder_cross", 0.0, layers=LAYERS - 1, queries=2)
    after = under(detector, memory, last)
    assert (after[:, others] - before[:, others]).abs().max() < tolerance_of(kind)
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-4
    # In an earlier layer, self-attention mixes the queries afterwards.
    first = gates_at(detector, "decoder_cross", 0.0, layers=0, queries=2)
    assert (under(detector, memory, first)[:, others] - before[:, others]).abs().max() > 1e-7


def contexts(detector, memory, gates):
    """The context of every attention call of the decoder, (B or more, H, T, D), by address."""
    found = {}

    def record(call, proceed):
        found[call.address] = proceed(call)
        return found[call.address]

    with detector.intercepting(record):
        detector.decode(memory, gates)
    return found


@pytest.mark.parametrize("site", ["decoder_self", "decoder_cross"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_gate_scales_its_head_and_query_and_reaches_nothing_before(kind, site):
    """Everything but one entry of the gates is perturbed, and then that entry alone."""
    detector, memory = encoded(kind)
    before = contexts(detector, memory, None)
    here = next(address for address in before if address.site == site and address.layer == LAYER)
    earlier = list(before)[: list(before).index(here)]
    exact = {"rtol": 0, "atol": tolerance_of(kind)}

    one = gates_at(detector, site, 0.25, layers=LAYER, heads=HEAD, queries=4)
    after = contexts(detector, memory, one)
    for address in earlier:
        torch.testing.assert_close(after[address], before[address], **exact)
    expected = before[here].clone()
    expected[:, HEAD, 4] *= 0.25
    torch.testing.assert_close(after[here], expected, **exact)

    gate = torch.full_like(one.site(site), 0.25)
    gate[:, LAYER, 4, HEAD] = 1
    gate[:, :LAYER] = 1
    after = contexts(detector, memory, Gates(("the others",), **{site: gate}))
    expected = before[here] * 0.25
    expected[:, HEAD, 4] = before[here][:, HEAD, 4]
    torch.testing.assert_close(after[here], expected, **exact)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if has(kind, "encoder_self")])
@torch.no_grad()
def test_encoder_gates_act_on_the_head_and_the_token(kind):
    detector = loaded(kind, dtype_of(kind))
    pixels, mask = batch(detector.dtype)
    found = []

    def record(call, proceed):
        found.append((call.address, proceed(call)))
        return found[-1][1]

    layout = detector.head_layout
    features = detector.features(pixels, mask)
    with detector.intercepting(record):
        detector.encode_features(features)
        before, found = found, []
        tokens = before[0][1].shape[2]
        gate = torch.ones(layout.encoder_layers, tokens, layout.heads_at("encoder_self"))
        gate[0, 3, HEAD] = 0.5
        detector.encode_features(features, gate)
    assert [address for address, _ in before] == [("encoder_self", i) for i in range(layout.encoder_layers)]
    expected = before[0][1].clone()
    expected[:, HEAD, 3] *= 0.5
    torch.testing.assert_close(found[0][1], expected, rtol=0, atol=tolerance_of(kind))


@pytest.mark.parametrize("kind", TWO_STAGE)
@torch.no_grad()
def test_the_choice_of_queries_is_made_before_the_decoder(kind):
    detector, memory = encoded(kind)
    starts = []

    def record(call, proceed):
        if call.address == ("decoder_cross", 0):
            starts.append(call.locations.mean((2, 3, 4)))
        return proceed(call)

    with detector.intercepting(record):
        detector.decode(memory)
        detector.decode(memory, gates_at(detector, "decoder_cross", 0.0))
    torch.testing.assert_close(starts[1], starts[0], rtol=0, atol=1e-12)
    # In the memory the images' queries differ: they are chosen from the image.
    assert (starts[0][0] - starts[0][1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_head_that_is_off_contributes(kind):
    """A head whose replacement is its own context is as good as on; another one is not."""
    detector, memory = encoded(kind)
    on = under(detector, memory, gates_at(detector, "decoder_cross", 1.0))
    gates = gates_at(detector, "decoder_cross", 0.0, layers=LAYERS - 1, heads=HEAD)
    before = contexts(detector, memory, None)
    with detector.replacing(lambda call: before[call.address]):
        replaced = under(detector, memory, gates)
    torch.testing.assert_close(replaced, on, rtol=0, atol=tolerance_of(kind))
    with detector.replacing(lambda call: 2 * before[call.address]):
        assert (under(detector, memory, gates) - on).abs().max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_image_processor(kind):
    detector, memory = encoded(kind)
    with torch.no_grad():
        output = detector.decode(memory)
    name = {"rf_detr": "RfDetr", "conditional_detr": "ConditionalDetr", "dab-detr": "ConditionalDetr"}
    name |= dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine"), "RTDetr") | {"table-transformer": "Detr"}
    processor = getattr(transformers, f"{name.get(kind, 'DeformableDetr')}ImageProcessor")()
    logits, boxes = output.logits[0], output.boxes[0]
    # Logits that differ, so that most queries have several classes above the confidence.
    logits = 2 * (logits - logits.mean((0, 1))) / logits.std((0, 1)) + 1
    result = type("Output", (), {"logits": logits, "pred_boxes": boxes})
    theirs = processor.post_process_object_detection(result, threshold=0.3, target_sizes=[(60, 90)] * 2)
    for image, expected in enumerate(theirs):
        found = detections_from(
            logits[image], boxes[image], (60, 90), detector.class_names, 0.3, detector.scoring
        )
        order = expected["scores"].argsort(descending=True, stable=True)
        assert len(found) == len(order) > 0
        torch.testing.assert_close(found.scores, expected["scores"][order].float(), rtol=0, atol=1e-6)
        assert found.labels.tolist() == expected["labels"][order].tolist()
        limits = torch.tensor([90.0, 60, 90, 60])
        clipped = expected["boxes"][order].float().clamp(min=torch.zeros(4), max=limits)
        torch.testing.assert_close(found.boxes, clipped, rtol=0, atol=1e-4)
        if detector.scoring.kind == "sigmoid":
            assert len(set(found.queries.tolist())) < len(found)
            assert len(found) <= (detector.scoring.most or QUERIES * CLASSES)


@contextmanager
def attending(detector, around):
    """Within this context `around()` is called before each attention callable, which gets the rows of its call."""
    before = detector.attention, detector.deformable_attention

    def dense(query, key, value, attn_mask=None, *, head_gate=None):
        around(query.shape[0] * query.shape[2])
        return before[0](query, key, value, attn_mask, head_gate=head_gate)

    def deformable(value, shapes, locations, weights, *, head_gate=None):
        around(locations.shape[0] * locations.shape[1])
        return before[1](value, shapes, locations, weights, head_gate=head_gate)

    detector.attention, detector.deformable_attention = dense, deformable
    try:
        yield
    finally:
        detector.attention, detector.deformable_attention = before


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_one_run_until_a_gate_acts(kind):
    detector, memory = encoded(kind)
    dense = detector.adapter.decoder_cross(detector.model)[0].__class__.__name__.find("Deformable") < 0
    one, all_runs = len(memory) * QUERIES, 3 * len(memory) * QUERIES
    for site, layer in (("decoder_cross", 0), ("decoder_self", 1), ("decoder_cross", LAYERS - 1)):
        heads = heads_off(0, site=site, layers=[layer]), heads_off(1, site=site, layers=[layer])
        plan = detector.plan(stack([parse_configuration("none"), *heads], detector.head_layout))
        apart = replace(plan, first=None)
        expected, rows = detector.decode(memory, apart), []
        with attending(detector, rows.append):
            found = detector.decode(memory, plan)
        for ours, theirs in ((found.logits, expected.logits), (found.boxes, expected.boxes)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance_of(kind))
        # Two calls in each layer. Deformable attention is gated after it.
        shared = 2 * layer + (site == "decoder_cross") + (site == "decoder_cross" and not dense)
        assert rows == [one] * shared + [all_runs] * (2 * LAYERS - shared)


@pytest.mark.parametrize("kind", ["conditional_detr", "rt_detr"])
def test_gradients_do_not_depend_on_what_is_computed_once(kind):
    detector, memory = encoded(kind)
    gates = [parse_configuration(text) for text in ("none", "H0", "L1H1")]
    plan = detector.plan(stack(gates, detector.head_layout))
    tokens = memory.arguments["encoder_hidden_states"].clone().requires_grad_()
    memory = replace(memory, arguments={**memory.arguments, "encoder_hidden_states": tokens})
    found, expected = (
        torch.autograd.grad(detector.decode(memory, one).logits.square().sum(), tokens)[0]
        for one in (plan, replace(plan, first=None))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_prepared_and_computed_in_parts_is_the_same(kind, monkeypatch):
    detector, memory = encoded(kind)
    gates = stack([parse_configuration(text) for text in ("none", "H0", "L1H1")], detector.head_layout)
    tokens = memory.arguments["encoder_hidden_states"]
    with torch.no_grad():
        expected = detector.decode(memory, gates)
        prepared = detector.prepare(memory)
        for module, value in prepared.values[2].items():
            assert torch.equal(module(tokens), value)
        monkeypatch.setattr("headoff.family.passes.ROWS", 1)  # one run at a time
        found = detector.decode(prepared, gates)
        other = detector.decode(
            replace(prepared, arguments={**prepared.arguments, "encoder_hidden_states": tokens + 1}), gates
        )
    for ours, theirs in ((found.logits, expected.logits), (found.boxes, expected.boxes)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance_of(kind))
    assert not torch.allclose(other.logits, expected.logits)


@pytest.mark.parametrize("kind", ["conditional_detr", "rt_detr"])
def test_threads_may_use_a_detector_together(kind):
    """Under gates of their own, and while another one encodes; they meet before every attention call."""
    detector, memory = encoded(kind)
    pixels, mask = batch(detector.dtype)
    jobs = [
        lambda: detector.decode(memory, ["none", "H0"]),
        lambda: detector.decode(memory, "decoder_self L0H1"),
        lambda: detector.decode(detector.encode(pixels[:, :, :32], mask[:, :32]), ["H1", "H2", "none"]),
    ]
    with torch.inference_mode():
        expected = [job() for job in jobs]
    together, met = threading.Barrier(len(jobs)), []

    def meet(_):
        try:
            together.wait(20)
            met.append(True)
        except threading.BrokenBarrierError:  # another one has ended
            pass

    def run(job):
        with torch.inference_mode():
            try:
                return job()
            finally:
                together.abort()

    with attending(detector, meet), ThreadPoolExecutor(len(jobs)) as threads:
        found = list(threads.map(run, jobs))
    assert len(met) >= 2 * len(jobs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-9)


def test_configurations_with_the_same_gates_are_computed_once():
    detector = loaded("rt_detr")
    pixels, _ = batch()
    texts = ["none", "first 2", "L1H1", "decoder_self: L0H1"]
    same = [*texts[:2], "H0-1", *texts[2:], "last 4"]
    gates = stack(
        [parse_configuration(text).named(str(i)) for i, text in enumerate(same)], detector.head_layout
    )
    plan, alone = detector.plan(gates), detector.plan(gates, share=False)
    assert (plan.runs, alone.runs) == (5, 6)
    with torch.no_grad():
        memory = detector.encode(pixels)
        shared, separate = detector.decode(memory, plan), detector.decode(memory, alone)
    torch.testing.assert_close(shared.logits, separate.logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shared.boxes, separate.boxes, rtol=1e-12, atol=1e-14)
    assert torch.equal(shared.logits[1], shared.logits[2])
