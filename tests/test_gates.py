from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from headoff.errors import GateError
from headoff.gates import (
    SITES,
    Clause,
    Configuration,
    Gates,
    HeadLayout,
    Heads,
    all_subsets,
    cumulative,
    first_off,
    heads_off,
    last_off,
    layers_off,
    none_off,
    off_matrix,
    off_vector,
    only_heads_on,
    order_by_score,
    random_order,
    single_heads,
    stack,
)

# No deadline: the first example pays for imports, and a busy machine is no failure.
quick = settings(max_examples=50, deadline=None)

DETR = HeadLayout()
SMALL = HeadLayout(encoder_layers=2, decoder_layers=3, heads=4, queries=5)


def numbers(count: int):
    return st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True).map(tuple)


def off_rows(layers: int, heads: int):
    return st.lists(st.tuples(*[st.floats(0, 1)] * heads), min_size=layers, max_size=layers).map(tuple)


@st.composite
def clauses(draw, layout: HeadLayout = SMALL) -> Clause:
    """Any clause that fits the layout."""
    site = draw(st.sampled_from(SITES))
    layers = layout.layers(site)
    some = {
        "queries": None if site == "encoder_self" else draw(st.none() | numbers(layout.queries)),
        "layers": draw(st.none() | numbers(layers)),
    }
    form = draw(st.sampled_from(["heads", "kept_heads", "off"]))
    if form == "heads":
        heads = draw(st.none() | numbers(layout.heads))
        return Clause(site, **some, heads=heads, gate=draw(st.just(0.0) | st.floats(0, 1)))
    if form == "kept_heads":
        heads = st.builds(Heads, st.none() | numbers(layers), st.none() | numbers(layout.heads))
        return Clause(site, **some, kept_heads=tuple(draw(st.lists(heads, min_size=1, max_size=3))))
    return Clause(site, **some, off=draw(off_rows(draw(st.sampled_from([1, layers])), layout.heads)))


def configurations(layout: HeadLayout = SMALL):
    return st.lists(clauses(layout), max_size=4).map(lambda some: Configuration(clauses=tuple(some)))


def dense(configuration: Configuration, site="decoder_cross", layout: HeadLayout = SMALL) -> torch.Tensor:
    """The gate with its defaults spelled out: (layers, queries, heads)."""
    gate = configuration.gate(site, layout)
    gate = torch.ones(1) if gate is None else gate
    return gate.expand(layout.layers(site), layout.queries, layout.heads)


def test_off_vector_is_the_complement_of_the_gate_in_every_layer():
    gate = off_vector([0, 1, 0, 1, 1, 0, 0, 0.25]).gate("decoder_cross", DETR)
    assert gate.dtype == torch.float32
    assert_close(gate, torch.tensor([1, 0, 1, 0, 0, 1, 1, 0.75]).expand(6, 1, 8))


@quick
@given(off_rows(3, 4))
def test_off_matrix_is_the_complement_of_the_gate(rows):
    off = torch.tensor(rows, dtype=torch.float64)
    assert_close(dense(off_matrix(off))[:, 0], (1 - off).float())


def test_where_nothing_is_off_there_is_no_gate():
    assert none_off().gate("decoder_cross", DETR) is None
    assert heads_off(1).gate("decoder_self", DETR) is None
    assert off_vector([0] * 8).gate("decoder_cross", DETR) is None
    assert stack([none_off()], DETR).decoder_cross is None


@pytest.mark.parametrize("site", SITES)
def test_a_gate_is_at_its_site_alone(site):
    gates = stack([heads_off(1, site=site)], SMALL)
    assert [name for name in SITES if gates.site(name) is not None] == [site]
    assert gates.site(site).shape == (1, SMALL.layers(site), 1, 4)
    assert heads_off(1).at(site) == heads_off(1, site=site)
    assert heads_off(1).at(site).sites == {site}


@quick
@given(numbers(4), numbers(3))
def test_heads_that_are_off_and_only_heads_on_are_complements(heads, layers):
    off, on = dense(heads_off(*heads, layers=layers)), dense(only_heads_on(*heads, layers=layers))
    assert_close(off + on, torch.ones_like(off))
    assert (off == 0).sum() == len(heads) * len(layers) * SMALL.queries


def test_everything_and_whole_layers():
    assert dense(only_heads_on()).eq(0).all()
    gate = dense(layers_off(1))
    assert gate[1].eq(0).all() and gate[[0, 2]].eq(1).all()
    assert heads_off() == layers_off() == none_off()


@quick
@given(configurations(), configurations())
def test_gates_multiply(a, b):
    assert a & b == b & a
    for site in SITES:
        assert_close(dense(a & b, site), dense(a, site) * dense(b, site))


@quick
@given(configurations(), numbers(5))
def test_for_queries_touches_their_rows_alone(configuration, queries):
    # Of all queries to begin with: what is about some already would be restricted further.
    here = [replace(c, queries=None) for c in configuration.clauses if c.site == "decoder_cross"]
    configuration = Configuration(clauses=tuple(here))
    whole, single = dense(configuration), dense(configuration.for_queries(*queries))
    others = [query for query in range(SMALL.queries) if query not in queries]
    assert single[:, list(queries)].equal(whole[:, list(queries)])
    assert single[:, others].eq(1).all()


@quick
@given(configurations(), numbers(2))
def test_on_layers_touches_those_layers_alone(configuration, layers):
    for site in SITES:
        here = Configuration(clauses=tuple(c for c in configuration.clauses if c.site == site))
        try:
            restricted = here.on_layers(*layers)
        except GateError:
            assert all(set(c.layers).isdisjoint(layers) for c in here.clauses)
            continue
        others = [layer for layer in range(SMALL.layers(site)) if layer not in layers]
        assert dense(restricted, site)[list(layers)].equal(dense(here, site)[list(layers)])
        assert dense(restricted, site)[others].eq(1).all()


@quick
@given(configurations())
def test_equality_is_of_clauses_not_of_names(configuration):
    other = configuration.named("another name")
    assert other.name == "another name"
    assert other == configuration and hash(other) == hash(configuration)


def test_minus_zero_is_zero():
    assert off_vector([-0.0, 1]).text == "0,1"


def test_automatic_names_say_what_is_off():
    assert heads_off(2, layers=[5]).name == "L5H2 off"
    assert heads_off(2).named("mine").for_queries(17).name == "query 17: H2 off"
    assert (only_heads_on(0, 1, 2) & off_vector([0, 0.5])).name == "0,0.5; only H0-2 on"


@quick
@given(st.permutations(range(4)), st.integers(0, 4))
def test_first_k_along_an_order_are_its_first_k(order, k):
    assert first_off(k, order) == first_off(k, torch.tensor(order)) == heads_off(*order[:k])
    assert first_off(k) == first_off(k, range(4))


@quick
@given(st.lists(st.permutations(range(4)), min_size=3, max_size=3), st.integers(0, 4))
def test_an_order_may_differ_from_layer_to_layer(orders, k):
    gate = dense(first_off(k, orders))[:, 0]
    for layer, order in enumerate(orders):
        assert set(gate[layer].eq(0).nonzero().flatten().tolist()) == set(order[:k])


@quick
@given(st.none() | st.permutations(range(4)) | st.lists(st.permutations(range(4)), min_size=3, max_size=3))
def test_cumulative_switches_off_one_head_more_each_time(order):
    gates = [dense(configuration) for configuration in cumulative(4, order)]
    for before, after in zip(gates, gates[1:], strict=False):
        assert (before - after).unique().tolist() == [0, 1]
        assert (before - after).sum(-1).eq(1).all()
    assert gates[0].eq(1).all() and gates[-1].eq(0).all()


def test_names_of_the_sweeps():
    assert [c.name for c in cumulative(2)] == ["none off", "first 1 off", "first 2 off"]
    assert [c.name for c in cumulative(1, site="decoder_self")] == ["none off", "decoder_self first 1 off"]
    assert [c.name for c in single_heads(1, 2)] == ["L0H0 off", "L0H1 off"]
    assert [c.name for c in all_subsets(2)] == ["none off", "H0 off", "H1 off", "H0-1 off"]


def test_sizes_of_the_sweeps():
    assert len(stack(cumulative(), DETR)) == 9
    singles, subsets = stack(single_heads(), DETR), stack(all_subsets(), DETR)
    assert len(singles) == 48 and len(subsets) == 256
    assert singles.decoder_cross.eq(0).flatten(1).sum(1).eq(1).all()
    assert singles.decoder_cross.eq(0).sum(0).eq(1).all()
    assert subsets.decoder_cross[:, 0, 0].unique(dim=0).shape == (256, 8)


@quick
@given(st.integers(0, 12), st.integers(0, 2**40))
def test_random_orders_are_permutations_and_repeatable(heads, seed):
    order = random_order(heads, seed)
    assert sorted(order) == list(range(heads))
    assert order == random_order(heads, seed)


def test_random_orders_never_change():
    # Published results name the seed.
    assert random_order(8, 0) == (3, 7, 5, 2, 4, 1, 6, 0)


@quick
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.booleans())
def test_order_by_score(scores, descending):
    order = order_by_score(scores, descending)
    assert sorted(order) == list(range(len(scores)))
    for first, second in zip(order, order[1:], strict=False):
        a, b = (scores[first], scores[second]) if descending else (scores[second], scores[first])
        assert a > b or (a == b and first < second)


def test_order_by_score_of_each_layer():
    assert order_by_score(torch.tensor([[1.0, 2.0, 2.0], [3.0, 2.0, 1.0]])) == ((1, 2, 0), (0, 1, 2))


@quick
@given(st.lists(configurations(), min_size=1, max_size=4))
def test_stack_has_the_gate_of_each(batch):
    batch = [configuration.named(str(i)) for i, configuration in enumerate(batch)]
    gates = stack(batch, SMALL)
    assert gates.names == tuple(map(str, range(len(batch))))
    for site in SITES:
        stacked = gates.site(site)
        if stacked is None:
            assert all(configuration.gate(site, SMALL) is None for configuration in batch)
            continue
        assert stacked.dtype == torch.float32
        assert stacked.shape[2] == max(g.shape[1] for c in batch if (g := c.gate(site, SMALL)) is not None)
        for row, configuration in zip(stacked, batch, strict=True):
            assert_close(row.expand(-1, SMALL.queries, -1), dense(configuration, site))


@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (3, [3]),
        (-1, [8]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -4), [8, 4, 0]),
        ([7, 1], [7, 1]),
        (torch.tensor([0, 0]), [0, 0]),
        (torch.arange(9) > 6, [7, 8]),
    ],
)
def test_gates_are_chosen_by_index(index, chosen):
    gates = stack(cumulative(), DETR)
    some = gates[index]
    assert some.names == tuple(gates.names[i] for i in chosen) and len(some) == len(chosen)
    assert some.decoder_cross.equal(gates.decoder_cross[chosen])
    assert some.encoder_self is None


def test_the_last_heads_are_those_of_the_detector():
    for heads in (4, 8):
        layout = HeadLayout(heads=heads)
        assert stack([last_off(3)], layout).decoder_cross.equal(
            stack([heads_off(*range(heads - 3, heads))], layout).decoder_cross
        )


def test_gates_go_to_another_dtype_or_device():
    gates = stack(cumulative(), DETR)
    assert gates.to(dtype=torch.float64).decoder_cross.dtype == torch.float64
    moved = gates.to("meta")
    assert moved.decoder_cross.is_meta and moved.decoder_cross.dtype == torch.float32
    assert moved.decoder_self is None and moved.names == gates.names
    with pytest.raises(IndexError):
        gates[9]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: heads_off(9),
            "'H9 off' names head 9, but at decoder_cross this detector goes from head 0 to",
        ),
        (lambda: heads_off(1, layers=[6]), "'L6H1 off' names layer 6"),
        (lambda: heads_off(1).for_queries(100), "query 100: H1 off' names query 100"),
        (lambda: only_heads_on(2, layers=[7]), "'only L7H2 on' names layer 7"),
        (lambda: off_vector([0] * 7), "has off amounts for 7 heads, but this detector has 8"),
        (lambda: off_matrix([[0] * 8] * 5), "an off matrix of 5 rows, but this detector has 6 layers"),
        (lambda: off_matrix([[1, 0], [1]]), "off amounts are in rows of different lengths, 2, 1"),
        (lambda: off_vector([]), r"off amounts must be a vector or a matrix, not \[\[\]\]"),
        (lambda: off_vector([0.5, float("nan")]), "the off amount nan is invalid"),
        (lambda: off_vector([float("inf")]), "the off amount inf is invalid"),
        (lambda: off_vector(["x"]), "the off amount 'x' is invalid"),
        (lambda: Configuration(clauses=(Clause(gate=1.5),)), "the gate 1.5 is invalid"),
        (lambda: Configuration(clauses=(Clause(gate=-0.5),)), "the gate -0.5 is invalid"),
        (
            lambda: Clause(heads=(1,), off=((1,),)),
            "either heads with a gate, or kept heads, or last heads, or off amounts",
        ),
        (lambda: Clause(off=((1,), (1, 1))), "must be equally long"),
        (lambda: Clause(last=0), "cannot be about the last 0 heads"),
        (lambda: Clause(queries=(1,), objects=(1,)), "about queries or about objects"),
        (lambda: last_off(9), "names the last 9 heads, but this detector has 8"),
        (lambda: heads_off(1).for_objects(0), "names objects"),
        (lambda: heads_off(-1), "a head number must be a whole number from 0 to 9999: -1 is not"),
        (lambda: heads_off([0, 1]), r"must be a whole number from 0 to 9999: \[0, 1\] is not"),
        (lambda: heads_off(0, layers=3), "layer numbers must be a list"),
        (lambda: heads_off(0, layers=[]), "the list of layer numbers is empty"),
        (lambda: first_off(10**12), "a count of heads must be a whole number"),
        (lambda: first_off(9), "names head 8"),
        (lambda: first_off(3, [1, 0]), "the order has only 2 heads"),
        (lambda: first_off(1, [0, 1, 1]), "head 1 is named 2 times, head 2 is missing"),
        (lambda: first_off(1, [[0, 1], [0, 2]]), "head 1 is missing, head 2 does not exist"),
        (lambda: first_off(1, [[0, 1], [0]]), "rows of different lengths"),
        (lambda: cumulative(3, [0, 1])[1], "permutation of 3 heads, head 2 is missing"),
        (lambda: order_by_score([1, float("nan")]), "the score of head 1 is NaN"),
        (lambda: order_by_score([None]), "scores of heads must be numbers"),
        (lambda: heads_off(1, site="cross"), "no attention site 'cross': use one of encoder_self"),
        (lambda: none_off().gate("cross", DETR), "no attention site 'cross'"),
        (lambda: heads_off(1).for_queries(3).at("encoder_self"), "encoder_self has no object queries"),
        (lambda: heads_off(1, site="encoder_self").for_queries(3), "encoder_self has no object queries"),
        (lambda: heads_off(1, layers=[1]).on_layers(2), "'L1H1 off' does not act on the layers 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, says):
    with pytest.raises(GateError, match=says) as raised:
        stack([make()], DETR)
    message = str(raised.value)
    assert "\n" not in message and ". " not in message and len(message) < 250


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: stack([], DETR), "a batch of gates cannot be empty"),
        (lambda: stack(cumulative(), DETR)[9:], "a batch of gates cannot be empty"),
        (lambda: stack(cumulative(), DETR)[[]], "a batch of gates cannot be empty"),
        (lambda: stack([none_off(), heads_off()], DETR), "2 configurations are named 'none off'"),
        (lambda: Gates(("a",), decoder_cross=torch.ones(2, 6, 1, 8)), r"have the shape \(2, 6, 1, 8\)"),
    ],
)
def test_batches_that_are_invalid(make, says):
    with pytest.raises(GateError, match=says):
        make()


def test_a_long_name_does_not_drown_the_message():
    with pytest.raises(GateError) as raised:
        off_matrix([[0] * 8] * 60).gate("decoder_cross", DETR)
    assert len(str(raised.value)) < 250
