"""The kind of a sweep follows from its configurations, in whatever way these are written."""

import random

import pytest

from headoff.gates import (
    Configuration,
    CumulativeSweep,
    SingleHeadSweep,
    SubsetSweep,
    all_subsets,
    cumulative,
    first_off,
    heads_off,
    kind_of,
    last_off,
    layers_off,
    none_off,
    off_matrix,
    off_vector,
    only_heads_on,
    parse_configuration,
    single_heads,
    sweeps_among,
)


def shuffled(configurations):
    return random.Random(0).sample(configurations, len(configurations))


@pytest.mark.parametrize(
    ("configurations", "heads"),
    [
        (cumulative(), 8),
        (cumulative(4, [3, 1, 0, 2]), 4),
        (cumulative(3, [[2, 0, 1], [0, 1, 2]]), 3),
        (cumulative(site="encoder_self"), 8),
        ([c.for_queries(17) if c.clauses else c for c in cumulative(3, [2, 0, 1])], 3),
        ([c.for_objects(0) if c.clauses else c for c in cumulative(3)], 3),
        ([none_off(), last_off(1), last_off(2)], 2),
        ([none_off(), off_vector([0, 1]), off_vector([1, 1])], 2),
        ([none_off(), heads_off(1)], 1),
    ],
)
def test_cumulative(configurations, heads):
    assert kind_of(configurations) == CumulativeSweep(heads)


@pytest.mark.parametrize(
    "configurations",
    [
        cumulative()[::2],
        cumulative()[1:],
        cumulative()[:0],
        [none_off()],
        [none_off(), heads_off(1), heads_off(2)],
        [none_off(), heads_off(1), heads_off(1, 2, site="decoder_self")],
        [none_off(), heads_off(1), heads_off(1, 2).for_queries(3)],
        [none_off(), heads_off(1).for_objects(3), heads_off(1, 2).for_queries(3)],
        [none_off(), first_off(1), last_off(2)],
        [none_off(), heads_off(1), off_vector([0, 1, 0.5])],
        [none_off(), first_off(1), first_off(2, site="decoder_self")],
        [none_off(), heads_off(1), only_heads_on(0)],
        [none_off(), heads_off(0, layers=[2]), heads_off(0, 1, layers=[2])],
    ],
)
def test_not_cumulative(configurations):
    assert not isinstance(kind_of(configurations), CumulativeSweep)


def test_single_heads():
    assert kind_of(single_heads(2, 3)) == SingleHeadSweep(
        "decoder_cross", (0, 1), (0, 1, 2), ((0, 1, 2), (3, 4, 5))
    )
    with_none = kind_of([none_off(), *single_heads(2, 3)])
    assert with_none.configurations == ((1, 2, 3), (4, 5, 6))
    configurations = shuffled(single_heads(site="encoder_self"))
    sweep = kind_of(configurations)
    assert sweep.site == "encoder_self" and (sweep.layers, sweep.heads) == ((*range(6),), (*range(8),))
    for layer, row in zip(sweep.layers, sweep.configurations, strict=True):
        for head, index in zip(sweep.heads, row, strict=True):
            assert configurations[index] == heads_off(head, layers=[layer], site="encoder_self")


@pytest.mark.parametrize(
    "configurations",
    [
        [one.named(f"mine {i}") for i, one in enumerate(single_heads())],
        [one.for_queries(5) for one in single_heads()],
        [heads_off(head, layers=[layer]) for layer in (2, 5) for head in (1, 3)],
        [off_matrix([[r == 0 and c == h for c in range(3)] for r in range(2)]) for h in range(3)],
        [off_vector([h == c for c in range(3)]).on_layers(1) for h in range(3)],
    ],
)
def test_single_heads_by_any_names_and_forms(configurations):
    assert isinstance(kind_of(configurations), SingleHeadSweep)


@pytest.mark.parametrize(
    "configurations",
    [
        single_heads()[:-1],
        single_heads()[:1],
        (*single_heads(), single_heads()[0]),
        (*single_heads(), heads_off(0, 1, layers=[0])),
        (*single_heads(), layers_off(0)),
        (*single_heads()[:-1], single_heads(site="decoder_self")[-1]),
        (*single_heads()[:-1], single_heads()[-1].for_queries(5)),
        (*single_heads()[:-1], parse_configuration("L5H7=0.5")),
        [heads_off(head) for head in range(8)],
        [heads_off(head, layers=[0, 1]) for head in range(8)],
        [
            Configuration(clauses=(*a.clauses, *b.clauses))
            for a, b in zip(single_heads(), single_heads()[1:], strict=False)
        ],
    ],
)
def test_not_single_heads(configurations):
    assert kind_of(configurations) is None


def test_subsets():
    assert kind_of(all_subsets(2)) == SubsetSweep((0, 1), ((), (0,), (1,), (0, 1)))
    configurations = shuffled(all_subsets(4))
    sweep = kind_of(configurations)
    assert [heads_off(*heads) for heads in sweep.off] == configurations
    vectors = [off_vector([a, 0, b]) for a in (0, 1) for b in (0, 1)]
    assert kind_of(vectors) == SubsetSweep((0, 2), ((), (2,), (0,), (0, 2)))
    on_layers = [one.on_layers(1, 2) if one.clauses else one for one in all_subsets(3)]
    assert isinstance(kind_of(on_layers), SubsetSweep)


@pytest.mark.parametrize(
    "configurations",
    [
        all_subsets(3)[:-1],
        all_subsets(3)[1:],
        (*all_subsets(3), none_off()),
        (*all_subsets(3)[:-1], all_subsets(3)[1]),
        (*all_subsets(3)[:-1], heads_off(0, 1, 2, layers=[0])),
        (*all_subsets(3)[:-1], heads_off(0, 1, 2, site="decoder_self")),
        (*all_subsets(3)[:-1], heads_off(0, 1, 2).for_queries(1)),
        (*all_subsets(3)[:-1], off_vector([1, 1, 0.5])),
        (*all_subsets(3)[:-1], layers_off(0)),
        (*all_subsets(3)[:-1], only_heads_on(3)),
    ],
)
def test_not_subsets(configurations):
    assert kind_of(configurations) is None


def test_several_sweeps_at_once():
    distinct = {one.text: one for one in (*cumulative(4), *single_heads(3, 4), *all_subsets(4))}
    configurations = tuple(distinct.values())
    found = sweeps_among(configurations)
    assert [type(kind) for kind, _ in found] == [CumulativeSweep, SingleHeadSweep, SubsetSweep]
    for kind, indices in found:
        assert kind_of([configurations[index] for index in indices]) == kind
        assert indices[0] == 0
    assert [len(indices) for _, indices in found] == [5, 13, 16]


def test_subsets_have_a_cumulative_sweep_and_other_configurations_none():
    found = dict(reversed([(type(kind), indices) for kind, indices in sweeps_among(all_subsets(3))]))
    assert [all_subsets(3)[index].text for index in found[CumulativeSweep]] == ["none", "H0", "H0-1", "H0-2"]
    assert sweeps_among((none_off(), heads_off(1), heads_off(2).for_queries(3))) == []
    reverse = cumulative(3, [2, 1, 0])
    assert [indices for kind, indices in sweeps_among(reverse)] == [(0, 1, 2, 3)]
    self_attention = (none_off(), *single_heads(2, 2), *single_heads(2, 2, site="decoder_self"))
    assert [kind.site for kind, _ in sweeps_among(self_attention)] == ["decoder_self", "decoder_cross"]
