"""What heads that are off contribute: every kind at every site, reference sets, and the constants that are fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import headoff
from headoff.ablation import ablation_draws, fit_optimal, gather_references, make_ablation
from headoff.ablation.kinds import Ablation, ConstantReplacement, attend_uniformly
from headoff.ablation.references import fingerprint_of, hash_of_image
from headoff.calls import AttentionAddress, AttentionCall
from headoff.choices import SITES
from headoff.errors import SettingError
from headoff.gates import heads_off, none_off, off_vector, stack
from headoff.sweeps import decode_all

CONFIGURATIONS = [
    heads_off(2, layers=[4]),
    heads_off(*range(8)),
    off_vector([0.25] * 8),
    heads_off(1, 3).for_queries(5),
]


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes", dtype="float64")


@pytest.fixture(scope="module")
def images():
    return headoff.sample_images()[:3]


@pytest.fixture(scope="module")
def references(detector, images):
    return gather_references(detector, images, samples=2)


def features_of(detector, image):
    with torch.inference_mode():
        return detector.features(detector.preprocess(image)[0])


def decoded(detector, image, configurations, ablation):
    gates = stack(configurations, detector.head_layout)
    with torch.inference_mode(), ablation.applied_to(detector):
        output = decode_all(detector, features_of(detector, image), gates)
    return torch.cat((output.logits, output.boxes), -1)[:, 0]


def contexts_of(detector, image):
    """The contexts (H, T, D) of every call, with everything on."""
    found = {}

    def record(call, proceed):
        found[call.address] = proceed(call)
        return found[call.address]

    with torch.inference_mode(), detector.intercepting(record):
        pixels, _ = detector.preprocess(image)
        detector.decode(detector.encode(pixels))
    return found


@pytest.mark.parametrize("site", SITES)
def test_a_head_replaced_by_its_own_context_changes_nothing(detector, images, site):
    contexts = contexts_of(detector, images[0])
    own = {site: torch.stack([context[0] for address, context in contexts.items() if address.site == site])}
    ablation = Ablation("resample", ConstantReplacement(own, detector))
    configurations = [one.at(site) for one in CONFIGURATIONS[:3]]
    # Off in one layer only: what comes after sees the same input, so the context of later layers is its own, too.
    expected = decoded(detector, images[0], [none_off()], Ablation("zero"))
    found = decoded(detector, images[0], configurations, ablation)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-10)
    assert (decoded(detector, images[0], configurations, Ablation("zero")) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["mean", "resample", "uniform"])
@pytest.mark.parametrize("site", SITES)
def test_kinds_are_what_the_equation_says(detector, images, references, kind, site):
    """context' = g A V + (1 - g) r, with r by another way: from the recorded calls."""
    configurations = [one.at(site) for one in CONFIGURATIONS[:3]]
    if site != "encoder_self":
        configurations.append(CONFIGURATIONS[3].at(site))
    ablation = make_ablation(kind, detector, references, images[2])
    found = decoded(detector, images[2], configurations, ablation)
    recorded = [contexts_of(detector, image) for image in images]
    other = recorded[0]
    means = {
        address: sum(contexts[address][0] for contexts in recorded) / 3
        for address in other
        if address.site == site != "encoder_self"
    }

    def by_hand(call, proceed):
        context = proceed(call)
        if call.head_gate is None:
            return context
        rows = call.query.shape[2]
        if kind == "uniform":
            r = call.value.sum(2, keepdim=True) / call.value.shape[2]
        elif kind == "mean" and site == "encoder_self":
            r = sum(contexts[call.address].mean(2, keepdim=True) for contexts in recorded) / 3
        elif kind == "mean":
            r = means[call.address].repeat(1, rows // means[call.address].shape[1], 1)
        else:
            r = other[call.address][0].half().double()
            if site == "encoder_self":
                r = r[:, [(token * 64 // rows) * rows // 64 for token in range(rows)]]
            else:
                r = r.repeat(1, rows // r.shape[1], 1)
        return context + (1 - call.head_gate) * r

    with detector.intercepting(by_hand):
        expected = decoded(detector, images[2], configurations, Ablation("zero"))
    atol = 1e-5 if kind == "mean" else 1e-10  # means are stored in float32
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_padding_is_left_out_of_uniform_attention():
    # A call, not a model: in a model, padding changes the backbone's features at the border.
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()[:, None, None]
    call = AttentionCall(AttentionAddress("decoder_cross", 0), query, key, value, mask, None)
    kept = [value[:1].mean(2, keepdim=True), value[1:, :, [0, 1, 3]].mean(2, keepdim=True)]
    torch.testing.assert_close(attend_uniformly(call), torch.cat(kept))


def test_configurations_in_one_batch_give_what_they_give_alone(detector, images, references):
    ablation = make_ablation("mean", detector, references)
    together = decoded(detector, images[0], CONFIGURATIONS, ablation)
    for index, configuration in enumerate(CONFIGURATIONS):
        alone = decoded(detector, images[0], [configuration], ablation)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-10)


def test_sweep_and_explain_take_an_ablation(detector, images, references):
    swept = headoff.sweep(detector, images[0], ["none", "first 3"], ablation="mean", references=references)
    explained = headoff.explain(
        detector, images[0], ["none", "first 3"], layers="last", ablation="mean", references=references
    )
    zero = headoff.sweep(detector, images[0], ["none", "first 3"])
    assert (swept.ablation, zero.ablation) == ("mean", "zero")
    assert swept.as_dict()["ablation"] == "mean"
    torch.testing.assert_close(explained.logits, swept.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(swept.logits[0], zero.logits[0], rtol=0, atol=1e-9)
    assert (swept.logits[1] - zero.logits[1]).abs().max() > 1e-2


def test_relevance_is_of_the_ablated_model(detector, images):
    """The fast engine equals autograd through the same model, where r is constant."""
    r = {"decoder_cross": torch.randn(6, 8, 20, 16, generator=torch.Generator().manual_seed(0))}
    ablation = Ablation("mean", ConstantReplacement(r, detector))
    configuration = "L5H0-3"
    fast = headoff.explain(
        detector, images[0], configuration, method="attention_gradcam", layers="last", ablation=ablation
    )
    detection = fast.objects[0]
    weights = {}

    def keep(call, proceed):
        # Eager attention, so that the weights exist.
        scores = call.query @ call.key.transpose(-1, -2) / call.query.shape[-1] ** 0.5
        a = scores.softmax(-1)
        a = a if call.head_gate is None else a * call.head_gate
        if call.address == ("decoder_cross", 5):
            weights["last"] = a
        return a @ call.value

    pixels, _ = detector.preprocess(images[0])
    with ablation.applied_to(detector), detector.intercepting(keep):
        output = detector.decode(detector.encode(pixels.requires_grad_()), configuration)
    logit = output.logits[0, 0, detection.query, detection.label]
    (gradient,) = torch.autograd.grad(logit, weights["last"])
    assert float(fast.values[0, 0]) == pytest.approx(logit.item(), abs=1e-9)
    a, da = (x.detach()[0, :, detection.query] for x in (weights["last"], gradient))
    by_hand = (a * da.mean(-1, keepdim=True)).mean(0).clamp(min=0)
    torch.testing.assert_close(fast.maps[0, 0, 0].flatten(), by_hand, rtol=1e-6, atol=1e-12)


def test_a_sweep_of_several_draws_has_their_mean(detector, references, images):
    options = {"ablation": "resample", "references": references}
    configurations = ["none", "H2", "first 6"]
    found = headoff.sweep(detector, images[1], configurations, draws=2, **options)
    one = headoff.sweep(detector, images[1], configurations, **options)
    assert len(found.draws) == 2 and one.draws == () and torch.equal(found.logits, one.logits)
    each = [
        headoff.sweep(detector, images[1], configurations, ablation=draw).survival()
        for draw in ablation_draws("resample", detector, references, images[1])
    ]
    assert not torch.equal(*each)
    rows = list(found.rows())
    expected = torch.stack(each).mean(0).T.flatten().tolist()
    assert [row["mean_query_score"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert {row["draws"] for row in rows} == {2} and all(row["share_found"] in (0, 0.5, 1) for row in rows)
    assert all(row["share_found"] == 1 for row in rows if row["configuration"] == "none off")
    assert len(found.as_dict()["draws"]) == 2
    for wrong in ({"draws": 2}, {"draws": 0, **options}):
        with pytest.raises(SettingError, match="draws need the ablation kind resample"):
            headoff.sweep(detector, images[1], configurations, **wrong)


def test_a_reference_set_survives_its_file(tmp_path, references, detector, images):
    fitted = replace(references, optimal={"decoder_cross": torch.ones(6, 8, 1, 16)})
    fitted.save(tmp_path / "r.safetensors")
    read = headoff.load_references(tmp_path / "r.safetensors")
    assert (read.fingerprint, read.images, read.sampled) == (
        fitted.fingerprint,
        fitted.images,
        fitted.sampled,
    )
    for name in ("mean", "samples", "optimal"):
        for site, tensor in getattr(fitted, name).items():
            assert torch.equal(getattr(read, name)[site], tensor)


def test_resample_draws_every_sampled_image_but_the_judged_one(detector, references, images):
    assert references.sampled == (hash_of_image(images[0]), hash_of_image(images[2]))
    assert len(ablation_draws("resample", detector, references, images[1])) == 2
    (draw,) = ablation_draws("resample", detector, references, images[0])
    expected = make_ablation("resample", detector, references, images[0])
    configuration = [heads_off(0)]
    assert torch.equal(
        decoded(detector, images[0], configuration, draw),
        decoded(detector, images[0], configuration, expected),
    )


@pytest.mark.parametrize(
    ("site", "steps"),
    [("decoder_cross", 40), ("decoder_self", 20), pytest.param("encoder_self", 10, marks=pytest.mark.slow)],
)
def test_optimal_constants_change_less_than_zero_and_mean_on_the_images_they_were_fitted_on(
    images, site, steps
):
    detector, images = headoff.load("scenes"), images[:2]
    references = gather_references(detector, images, samples=2)
    finished = []
    fitted = fit_optimal(
        detector,
        images,
        references,
        site=site,
        value="logit",
        steps=steps,
        progress=lambda *counts: finished.append(counts),
    )
    assert finished[-1] == (steps, steps) and set(fitted.optimal) == {site}

    def change(constants):
        total = 0.0
        for image in images:
            objects = headoff.detect(detector, image)
            ablation = Ablation("optimal", constants)
            configurations = headoff.single_heads(site=site)
            base = decoded(detector, image, [none_off()], Ablation("zero"))
            found = decoded(detector, image, configurations, ablation)
            at = [(detection.query, detection.label) for detection in objects]
            total += sum(float((found[:, q, k] - base[:, q, k]).square().sum()) / len(at) for q, k in at)
        return total

    optimal = change(ConstantReplacement(fitted.optimal, detector))
    mean = {site: references.mean[site].mean(2, keepdim=True)}
    assert optimal < 0.9 * change(None)
    assert optimal < 0.9 * change(ConstantReplacement(mean, detector))


def test_the_bundled_reference_set_is_of_the_bundled_model(images):
    detector = headoff.load("scenes")
    for kind in ("mean", "resample", "optimal"):
        assert ablation_draws(kind, detector, image=images[0])
    assert fingerprint_of(detector) == fingerprint_of(headoff.load("scenes", dtype="bfloat16"))


def test_errors_name_the_culprit_and_the_remedy(tmp_path, detector, references, images):
    other = headoff.Detr(detector.config)
    for call, message in [
        (lambda: make_ablation("men", detector), "did you mean 'mean'"),
        (lambda: make_ablation("mean", other), "gather one from a folder of images"),
        (lambda: make_ablation("mean", other, references), "gathered with another model"),
        (lambda: make_ablation("optimal", detector, references), "has no optimal constants"),
        (
            lambda: make_ablation(
                "optimal", detector, replace(references, optimal=references.mean), images[0]
            ),
            "were fitted on the image that is judged",
        ),
        (
            lambda: make_ablation(
                "resample", detector, replace(references, sampled=references.sampled[:1]), images[0]
            ),
            "no image other than the one that is judged",
        ),
        (lambda: headoff.load_references(tmp_path / "none"), "there is no reference set"),
        (lambda: headoff.load_references(images[0]), "is no reference set"),
        (lambda: gather_references(detector, []), "needs images"),
        (lambda: gather_references(detector, images, samples=0), "at least 1"),
        (lambda: fit_optimal(detector, images, references, value="duplicates"), "has no gradient"),
        (
            lambda: fit_optimal(detector, images, replace(references, mean={}), site="encoder_self"),
            "has nothing at encoder_self",
        ),
        (lambda: fit_optimal(other, images, references), "another model"),
        (
            lambda: fit_optimal(detector, [headoff.sample_image(9)], references),
            "not of the reference set",
        ),
        (
            lambda: fit_optimal(detector, images, references, confidence=1.0),
            "no reference image has a detection",
        ),
    ]:
        with pytest.raises(headoff.HeadoffError, match=message):
            call()
    with pytest.raises(SettingError, match="nothing for decoder_cross"):
        decoded(detector, images[0], [heads_off(0)], Ablation("mean", ConstantReplacement({}, detector)))
    cut = tmp_path / "cut.safetensors"
    references.save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(SettingError, match="is no reference set"):
        headoff.load_references(cut)
