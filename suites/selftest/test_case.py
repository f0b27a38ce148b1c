"""Case ids: a canonical text, inverted by parse; impossible ones are named, misspelt ones corrected."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.case import EXAMPLE_ID, FILLS, SKEWS, Case, Recipe, Shape
from harness.errors import CaseError, UnknownName
from reference.activation import ACTIVATIONS
from reference.formats import all_formats
from reference.routing import RULES

PLAIN = [f.name for f in all_formats().values() if f.scaling is None]
ids = st.builds(
    Case,
    op=st.just("moe"),
    shape=st.builds(
        Shape,
        st.integers(0, 999),
        st.integers(1, 9999),
        st.integers(1, 9999),
        st.sampled_from((1, 16, 64, 384)),
        st.integers(1, 16),
    ),
    routing=st.sampled_from(sorted(RULES)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    recipe=st.builds(Recipe, st.sampled_from(sorted(all_formats())), *[st.sampled_from(PLAIN)] * 3),
    fill=st.sampled_from(FILLS),
    skew=st.sampled_from(SKEWS),
    seed=st.integers(0, 10**6),
)
SMALL = Case.parse("moe.bf16.t4.h64.i32.e16.k2.renormalize.swiglu.standard.exact.s0")


@settings(max_examples=50, deadline=None)
@given(case=ids.filter(lambda c: c.problem() is None))
def test_parse_inverts_id(case: Case) -> None:
    assert Case.parse(case.id) == case


@settings(max_examples=50, deadline=None)
@given(case=ids.filter(lambda c: c.problem() is not None))
def test_an_impossible_case_does_not_parse(case: Case) -> None:
    with pytest.raises(CaseError, match="impossible"):
        Case.parse(case.id)


@settings(max_examples=50, deadline=None)
@given(case=ids)
def test_varying_every_axis_to_its_own_value_changes_nothing(case: Case) -> None:
    assert case.vary(**case.axes) == case


def test_the_example_is_a_case() -> None:
    case = Case.parse(EXAMPLE_ID)
    assert str(case) == EXAMPLE_ID
    assert case.shape == Shape(33, 7168, 512, 384, 8)
    assert case.recipe == Recipe("nvfp4", "bf16", "bf16", "bf16")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("nvfp4", ("nvfp4", "bf16", "bf16", "bf16")),
        ("fp16", ("fp16", "fp16", "fp16", "fp16")),
        ("mxfp4-fp16", ("mxfp4", "fp16", "fp16", "fp16")),
        ("bf16-bf16-bf16-fp32", ("bf16", "bf16", "bf16", "fp32")),
        ("bf16-bf16-fp32", ("bf16", "bf16", "fp32", "bf16")),
    ],
)
def test_recipes_drop_trailing_defaults(text: str, parts: tuple[str, str, str, str]) -> None:
    assert Recipe.parse(text) == Recipe(*parts)
    assert str(Recipe(*parts)) == text


@pytest.mark.parametrize(
    "text",
    ["", "moe", EXAMPLE_ID + ".x", EXAMPLE_ID.replace("t33", "t-1"), EXAMPLE_ID.replace(".s0", ""), "bf16-" + EXAMPLE_ID],
)
def test_text_that_is_no_id_says_what_was_wanted(text: str) -> None:
    with pytest.raises(CaseError, match="does not parse"):
        Case.parse(text)


@pytest.mark.parametrize("recipe", ["bf16-bf16-bf16-bf16-bf16", "bf16-", "bf16--bf16"])
def test_a_recipe_of_wrong_length_is_refused(recipe: str) -> None:
    with pytest.raises(CaseError, match="recipe"):
        Recipe.parse(recipe)


@pytest.mark.parametrize("edit", [("nvfp4", "nvfp4-bf16"), (".t33", ".t033"), (".s0", ".uniform.s0"), (".s0", ".s00")])
def test_a_second_spelling_is_refused_and_the_first_one_given(edit: tuple[str, str]) -> None:
    """Two texts of one case would be judged and recorded twice."""
    with pytest.raises(CaseError, match="not canonical; write moe"):
        Case.parse(EXAMPLE_ID.replace(*edit))


@pytest.mark.parametrize(
    ("given_name", "hint"),
    [
        ("nvfp44", "did you mean nvfp4"),
        ("deepseek_v33", "did you mean deepseek_v3"),
        ("swiglu_oia", "did you mean swiglu_oai"),
        ("exakt", "did you mean exact"),
    ],
)
def test_unknown_names_suggest_near_ones(given_name: str, hint: str) -> None:
    good = {"nvfp44": "nvfp4", "deepseek_v33": "deepseek_v3", "swiglu_oia": "swiglu", "exakt": "exact"}[given_name]
    with pytest.raises(UnknownName, match=hint):
        Case.parse(EXAMPLE_ID.replace(f".{good}.", f".{given_name}."))


@pytest.mark.parametrize("word", ["op", "activation format", "skew"])
def test_the_unknown_kind_is_said(word: str) -> None:
    new = {"op": ("moe.", "mole."), "activation format": ("standard", "batch"), "skew": (".s0", ".wet.s0")}[word]
    with pytest.raises(UnknownName, match=f"{word} "):
        Case.parse(EXAMPLE_ID.replace(*new))


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"hidden": 0}, "at least 1"),
        ({"inter": 0}, "at least 1"),
        ({"top_k": 0}, "at least 1"),
        ({"experts": 2049}, "at most 2048"),
        ({"top_k": 17, "fill": "real"}, "exceeds experts"),
        ({"hidden": 2**15, "inter": 2**15}, "elements or more"),
        ({"tokens": 2**16, "hidden": 2**15}, "elements or more"),
        ({"routing": "deepseek_v3", "experts": 8}, "at least 2"),
        ({"routing": "deepseek_v3", "top_k": 16}, "too few"),
        ({"recipe": "nvfp4-nvfp4-nvfp4-nvfp4"}, "output is written in a plain type"),
        ({"recipe": "fp8_block-fp8_block"}, "format of weights"),
        ({"recipe": "int4_g32-int4_g32_zp"}, "format of weights"),
        ({"recipe": "mxfp4-mxfp8", "hidden": 48}, "hidden 48 is not a multiple of 32"),
        ({"recipe": "bf16-bf16-mxfp4", "inter": 48}, "inter 48 is not a multiple of 32"),
        ({"recipe": "fp8_channel-fp8_token", "hidden": 3}, "at least 4"),
        ({"recipe": "nvfp4-int8_token"}, "no two codes of nvfp4 add up to 127"),
        ({"skew": "half", "top_k": 16}, "skew half"),
        ({"skew": "half", "routing": "deepseek_v3"}, "skew half"),
        ({"activation": "swiglu_oai"}, "no exact fill"),
        ({"top_k": 3}, "power of two"),
        ({"routing": "kimi_k2"}, "few bits"),
    ],
)
def test_impossible_combinations_say_why(axes: dict[str, int | str], reason: str) -> None:
    assert reason in str(SMALL.vary(**axes).problem())


@pytest.mark.parametrize(
    "axes",
    [
        {"tokens": 0},
        {"experts": 2048},
        {"top_k": 16},
        {"skew": "half", "top_k": 8},
        {"routing": "deepseek_v3"},
        {"routing": "deepseek_v3", "top_k": 8},
        {"fill": "real", "top_k": 3},
        {"fill": "real", "recipe": "nvfp4-int8_token"},
        {"recipe": "nvfp4-nvfp4", "hidden": 16, "inter": 16},
        {"recipe": "nvfp4-bf16-nvfp4", "hidden": 17, "inter": 16},
        {"recipe": "fp8_channel-fp8_token", "hidden": 4, "inter": 4},
        {"fill": "real", "routing": "kimi_k2"},
        {"fill": "real", "activation": "swiglu_oai"},
    ],
)
def test_combinations_at_the_edge_are_possible(axes: dict[str, int | str]) -> None:
    """A limit off by one forbids cases, and nobody misses them."""
    assert SMALL.vary(**axes).problem() is None
