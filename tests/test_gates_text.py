import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headoff.errors import GateError
from headoff.gates import (
    SITES,
    Clause,
    Configuration,
    Heads,
    all_subsets,
    check_order,
    cumulative,
    first_off,
    heads_off,
    last_off,
    layers_off,
    none_off,
    off_matrix,
    off_vector,
    only_heads_on,
    parse_configuration,
    parse_order,
    random_order,
    read_configurations,
    single_heads,
)

# No deadline: the first example pays for imports, and a busy machine is no failure.
quick = settings(max_examples=50, deadline=None)

numbers = st.lists(st.integers(0, 30) | st.integers(0, 9999), min_size=1, max_size=5).map(tuple)
some = st.none() | numbers
fractions = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
places = st.builds(Heads, some, some)
rows = st.integers(1, 5).flatmap(
    lambda heads: st.lists(st.tuples(*[fractions] * heads), min_size=1, max_size=3).map(tuple)
)


@st.composite
def clauses(draw) -> Clause:
    """Any clause at all, whether or not a detector has what it names."""
    site = draw(st.sampled_from(SITES))
    scope = {"layers": draw(some)}
    if site != "encoder_self":
        scope[draw(st.sampled_from(["queries", "objects"]))] = draw(some)
    form = draw(st.sampled_from(["heads", "kept_heads", "last", "off"]))
    if form == "last":
        return Clause(site, **scope, last=draw(st.integers(1, 9999)))
    if form == "heads":
        return Clause(site, **scope, heads=draw(some), gate=draw(fractions))
    if form == "kept_heads":
        return Clause(site, **scope, kept_heads=tuple(draw(st.lists(places, min_size=1, max_size=3))))
    return Clause(site, **scope, off=draw(rows))


configurations = st.lists(clauses(), max_size=5).map(lambda drawn: Configuration(clauses=tuple(drawn)))


@quick
@given(configurations)
def test_what_is_written_is_read_back_as_an_equal(configuration):
    text = configuration.text
    assert parse_configuration(text) == configuration
    assert parse_configuration(text).text == text == configuration.text


@quick
@given(configurations)
def test_an_automatic_name_reads_back_too(configuration):
    assert parse_configuration(configuration.name) == configuration


own_names = st.text(min_size=1, max_size=12).filter(
    lambda text: text[0].isalpha() and text == text.strip() and set(text).isdisjoint(",:;/=")
)


@quick
@given(own_names, configurations)
@example("L5H", none_off())
@example("first three", first_off(3))
def test_a_name_of_your_own_is_read_back_with_its_configuration(name, configuration):
    text = f"{name} = {configuration.text}"
    try:
        parse_configuration(name)
    except GateError:
        if not configuration.text.replace(".", "").isdecimal():  # what could be a gate is none
            read = parse_configuration(text)
            assert (read.name, read) == (name, configuration)
    else:
        with pytest.raises(GateError):
            parse_configuration(text)


def test_names_of_sweeps_read_back():
    for configuration in (
        *cumulative(),
        *single_heads(),
        *all_subsets(4),
        *cumulative(3, site="decoder_self"),
    ):
        assert parse_configuration(configuration.name) == configuration


@quick
@given(configurations, st.randoms(use_true_random=False))
def test_case_and_white_space_are_free(configuration, random: random.Random):
    # Not inside words and numbers, though.
    text = configuration.text
    spaced = [
        character
        + (
            ""
            if (character + next_).isalnum()
            or "_" in character + next_
            or not set(character + next_).isdisjoint(".-+e")
            else random.choice(["", " ", "\t", "\n"])
        )
        for character, next_ in zip(text, text[1:] + " ", strict=True)
    ]
    assert parse_configuration("  " + "".join(spaced).upper()) == configuration


@quick
@given(st.text(alphabet="LHlhallonyfirstqueryobjectlayer0123456789.,;:/=+-_ \t", max_size=30))
@example("H0-99999999999")
@example("9" * 5000)
@example("only")
@example("\0")
def test_any_text_is_read_or_refused_at_a_character(text):
    try:
        assert parse_configuration(parse_configuration(text).text) == parse_configuration(text)
    except GateError as error:
        message, shown, caret = str(error).split("\n")
        assert message.startswith("cannot read the configuration: ")
        assert len(shown) == 4 + len(text.rstrip())
        assert caret.strip() == "^" and caret.index("^") <= len(shown)


@pytest.mark.parametrize(
    ("text", "configuration"),
    [
        ("none", none_off()),
        ("None off", none_off()),
        ("first 3", heads_off(0, 1, 2)),
        ("FIRST 3 OFF", first_off(3)),
        ("first 0", none_off()),
        ("last 3", last_off(3)),
        ("Last 3 off", Configuration(clauses=(Clause(last=3),))),
        ("last 0", none_off()),
        ("layer 4: last 2; L0", last_off(2).on_layers(4) & layers_off(0)),
        ("object 0: L5H2", heads_off(2, layers=[5]).for_objects(0)),
        ("objects 0,2-3: decoder_self last 1", last_off(1, site="decoder_self").for_objects(0, 2, 3)),
        ("edges = L5H2+7", heads_off(2, 7, layers=[5])),
        ("mine=0,1,0", off_vector([0, 1, 0])),
        ("H2=0", heads_off(2)),
        ("H2", heads_off(2)),
        ("h 2", heads_off(2)),
        ("L5", layers_off(5)),
        ("L4H2,L5H0-3", heads_off(2, layers=[4]) & heads_off(0, 1, 2, 3, layers=[5])),
        ("L0-2+5H1+3", heads_off(1, 3, layers=[0, 1, 2, 5])),
        ("all", only_heads_on()),
        ("only L5H2 on", only_heads_on(2, layers=[5])),
        ("only H0-3 on", only_heads_on(0, 1, 2, 3)),
        ("L4H2=0.5", Configuration(clauses=(Clause(layers=(4,), heads=(2,), gate=0.5),))),
        ("H2=.25", Configuration(clauses=(Clause(heads=(2,), gate=0.25),))),
        ("0,1,0,1,1,0,0,0", off_vector([0, 1, 0, 1, 1, 0, 0, 0])),
        ("0, 1, .25 / 1, 0, 0", off_matrix([[0, 1, 0.25], [1, 0, 0]])),
        ("query 17: L5H2", heads_off(2, layers=[5]).for_queries(17)),
        ("queries 3,17-18: H1", heads_off(1).for_queries(3, 17, 18)),
        ("layer 4-5: 0,1", off_vector([0, 1]).on_layers(4, 5)),
        ("layers 4,5: only H1 on", only_heads_on(1).on_layers(4, 5)),
        ("decoder_self L0H1", heads_off(1, layers=[0], site="decoder_self")),
        ("encoder_self: first 2", heads_off(0, 1, site="encoder_self")),
        ("query 17: decoder_self L5H2", heads_off(2, layers=[5], site="decoder_self").for_queries(17)),
        ("query 1: H0, H1; L0H5", heads_off(0).for_queries(1) & heads_off(1).for_queries(1)
         & heads_off(5, layers=[0])),
    ],
)  # fmt: skip
def test_the_notation(text, configuration):
    assert parse_configuration(text) == configuration


@pytest.mark.parametrize(
    ("configuration", "text"),
    [
        (first_off(3), "H0-2"),
        (none_off(), "none"),
        (only_heads_on(), "all"),
        (heads_off(5, 3, 0, 1, layers=[2]), "L2H0-1+3+5"),
        (heads_off(1).for_queries(4, 3, 17), "query 3-4,17: H1"),
        (off_matrix([[0, 1], [0.5, 0]], site="decoder_self"), "decoder_self 0,1/0.5,0"),
        (heads_off(2, layers=[5]) & heads_off(1), "H1,L5H2"),
        (last_off(2).on_layers(4, 5).for_objects(1), "object 1: layer 4-5: last 2"),
        (only_heads_on(2).for_queries(1) & layers_off(0), "L0; query 1: only H2 on"),
    ],
)
def test_the_canonical_text(configuration, text):
    assert configuration.text == text


def test_names():
    assert parse_configuration("first 3").name == "first 3 off"
    assert parse_configuration("l4h2, L5H0-3").name == "L4H2,L5H0-3 off"
    assert parse_configuration("last 3").name == "last 3 off"
    assert parse_configuration("object 0: last 3").name == "object 0: last 3 off"
    assert parse_configuration("H2", name="mine").name == "mine"
    assert parse_configuration(" edge heads = L5H2; L0").name == "edge heads"
    assert parse_configuration("yours = H2", name="mine").name == "mine"
    assert parse_configuration("L5H2 = 0.5").name == "L5H2=0.5"


def refusal(parse, text: str) -> tuple[str, str]:
    """The message without its beginning, and the part of the text from the caret on."""
    with pytest.raises(GateError) as raised:
        parse(text)
    message, shown, caret = str(raised.value).split("\n")
    return message.split(": ", 1)[1], shown[caret.index("^"):]  # fmt: skip


def test_the_message_shows_the_text_and_the_place():
    with pytest.raises(GateError) as raised:
        parse_configuration("L4H2,L5Hx")
    assert str(raised.value) == (
        "cannot read the configuration: expected a head number after 'H'\n    L4H2,L5Hx\n            ^"
    )


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", "", "expected heads such as L4H2 or H0-3, an off vector"),
        ("foo", "foo", "expected heads such as"),
        ("-1,0", "-1,0", "expected heads such as"),
        ("L4H2,", "", "expected heads such as L4H2"),
        ("L4H2,3", "3", "H0+2 (several heads)"),
        ("L4H2 L5", "L5", "expected ',', ';' or the end"),
        ("L", "", "expected a layer number after 'L'"),
        ("first", "", "expected a number of heads after 'first'"),
        ("H3-1", "1", "expected a head number of at least 3"),
        ("H0-", "", "expected a head number after '-'"),
        ("H99999", "99999", "at most 9999"),
        ("H2=", "", "expected a gate from 0 (off) to 1 (on)"),
        ("H2=1.5", "1.5", "expected a gate from 0 (off) to 1 (on)"),
        ("H2=0.5 off", "off", "expected ',', ';' or the end"),
        ("only L5H2", "", "expected 'on'"),
        ("only L5H2 off", "off", "expected 'on'"),
        ("0,1,2", "2", "expected an off amount from 0 to 1"),
        ("0,nan", "nan", "expected an off amount from 0 to 1"),
        ("0,1/0", "0", "expected 2 off amounts in this row"),
        ("query: H2", ": H2", "expected a query number after 'query'"),
        ("query 17 H2", "H2", "expected ':' after the query numbers"),
        ("query 1: query 2: H1", "query 2: H1", "expected one query prefix only"),
        ("decoder_self decoder_cross H1", "decoder_cross H1", "expected one site prefix only"),
        ("query 1: object 2: H1", "query 1: object 2: H1", "name one of the two"),
        ("last", "", "expected a number of heads after 'last'"),
        ("first 3 = L5", "first 3 = L5", "'first 3' is a configuration and no name"),
        ("mine =", "", "expected heads such as L4H2"),
        ("a = b = L5", "b = L5", "expected heads such as L4H2"),
        ("H0; encoder_self query 3: H1", "encoder_self query 3: H1", "encoder_self has no object queries"),
        ("layer 4: L5H2", "layer 4: L5H2", "does not act on the layers 4"),
        ("\tH2\x1b[31m", " [31m", "expected ',', ';' or the end"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(text, at, says):
    message, rest = refusal(parse_configuration, text)
    assert says in message
    assert rest == at


def test_only_text_can_be_read():
    with pytest.raises(GateError, match="it must be text, 3 is not"):
        parse_configuration(3)


@quick
@given(st.integers(1, 8).flatmap(lambda heads: st.permutations(range(heads))))
def test_an_order_is_read(order):
    assert parse_order(",".join(map(str, order)))(len(order)) == tuple(order)


def test_orders_by_name():
    assert parse_order("Reverse")(4) == (3, 2, 1, 0)
    assert parse_order("random: 12345")(8) == random_order(8, 12345)
    assert parse_order("0,1 / 1,0")(2) == ((0, 1), (1, 0))
    assert check_order(parse_order("random:3")(5), 5)


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", "", "expected a head number, 'reverse', 'random:SEED' or 'importance'"),
        ("1,x", "x", "expected a head number"),
        ("random", "", "expected ':' and a seed"),
        ("random:x", "x", "expected a seed"),
        ("reverse 3", "3", "expected the end"),
        ("0 1", "1", "expected ',', '/' or the end"),
        (" 0,2,2", "0,2,2", "head 2 is named 2 times, head 1 is missing"),
        ("0,1/0", "0,1/0", "rows of different lengths"),
    ],
)
def test_orders_that_cannot_be_read(text, at, says):
    message, rest = refusal(parse_order, text)
    assert says in message
    assert rest == at


def test_an_order_for_another_number_of_heads():
    with pytest.raises(GateError, match="no permutation of 8 heads"):
        parse_order("1,0")(8)


@pytest.mark.parametrize(
    "text, word",
    [
        ("frist 3", "first"),
        ("nnoe", "none"),
        ("decoder_slef L0", "decoder_self"),
        ("qurey 3: H1", "query"),
        ("lsat 3", "last"),
        ("layr 3: H1", "layer"),
        ("objcet 0: H1", "object"),
        ("mine = frist 3", "first"),
    ],
)
def test_a_misspelt_word_is_named(text, word):
    with pytest.raises(GateError, match=rf"there is no word '\w+' \(did you mean '{word}'\?\)"):
        parse_configuration(text)


def test_configurations_are_read_one_by_one_or_several():
    assert read_configurations("first 3") == (first_off(3),)
    assert read_configurations(first_off(3)) == (first_off(3),)
    assert read_configurations(["none", "first 3", first_off(3), "none"]) == (none_off(), first_off(3))
    with pytest.raises(GateError, match="there is no configuration"):
        read_configurations([])
