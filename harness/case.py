"""A case is its id: everything that decides the inputs and the expected output, readable and parseable.

moe.nvfp4.t33.h7168.i512.e384.k8.deepseek_v3.swiglu.standard.exact.s0
op  recipe tokens hidden inter experts top_k routing activation format fill [skew] [bias] [weighting] seed

A case of another op names the axes that this op has, in the same order: quantize.nvfp4.t33.h256.real.s0. Its recipe says
first what is written, then what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from harness.anchors import Products
from harness.axes import ACTIVATION_FORMATS as ACTIVATION_FORMATS
from harness.axes import AXES as AXES
from harness.axes import BIASES as BIASES
from harness.axes import FILLS as FILLS
from harness.axes import IDS, LETTERS, OPTIONAL, PROBES
from harness.axes import NEUTRAL as NEUTRAL
from harness.axes import OPS as OPS
from harness.axes import SKEWS as SKEWS
from harness.axes import WEIGHTINGS as WEIGHTINGS
from harness.errors import CaseError, UnknownName
from harness.recipe import Recipe as Recipe
from harness.recipe import plain
from reference.activation import ACTIVATIONS
from reference.format import WHOLE
from reference.formats import all_formats
from reference.routing import RULES

MAX_ID = 300  # characters: a file name holds 255 of them, and Python reads numbers of 4300 digits at most
MAX_EXPERTS = 2048  # FlashInfer trtllm-gen routing kernels stop there
MAX_EXACT_SCALE = 7  # the numerator of a routed scaling factor (2.5 = 5/2): three of the eight bits of a bf16
MAX_SHARED = 16  # units of a shared slot: with fewer terms (harness/exact.py) sums stay below the 256 that a bf16 holds
LEAST_QUANTISED = 4  # columns of a row that shares one scale: peak, two constant features (harness/exact.py), one value
MAX_ELEMENTS = 2**31  # of one expert's weight matrix: the input hash counts elements in 32 bits


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of the layer: x [tokens, hidden], w13 [experts, 2 * inter, hidden], w2 [experts, hidden, inter]."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"t{self.tokens}.h{self.hidden}.i{self.inter}.e{self.experts}.k{self.top_k}"


@dataclass(frozen=True, order=True)
class Case:
    """One question to a kernel. Equal ids mean equal bytes of input on any device, on any day."""

    op: str
    shape: Shape
    routing: str
    activation: str
    recipe: Recipe
    fill: str
    skew: str = "uniform"
    activation_format: str = "standard"
    seed: int = 0
    bias: str = "nobias"
    weighting: str = "onoutput"

    @property
    def id(self) -> str:
        """The canonical text; `Case.parse` inverts it."""
        values = {**self.axes, "activation_format": self.activation_format}
        axes = OPS[self.op].axes if self.op in OPS else OPS["moe"].axes
        parts = [f"{LETTERS.get(a, '')}{values[a]}" for a in (*axes, "seed") if a not in OPTIONAL or values[a] != NEUTRAL[a]]
        return ".".join((self.op, *parts))

    def __str__(self) -> str:
        return self.id

    @classmethod
    def of(cls, axes: Mapping[str, int | str]) -> Case:
        """The case with a value for every axis; sizes and the seed may be given as text."""
        names = ("op", "routing", "activation", "fill", "skew", "activation_format", "bias", "weighting")
        return cls(
            **{name: str(axes[name]) for name in names},
            shape=Shape(*(int(axes[k]) for k in ("tokens", "hidden", "inter", "experts", "top_k"))),
            recipe=Recipe.parse(str(axes["recipe"])),
            seed=int(axes["seed"]),
        )

    @classmethod
    @lru_cache(maxsize=1024)  # in a journal a case's subjects are neighbours
    def parse(cls, text: str) -> Case:
        """The case called `text`; CaseError or UnknownName says what is wrong with it."""
        pattern = IDS.get(text.strip().partition(".")[0], IDS["moe"])
        match = pattern.fullmatch(text.strip()) if len(text) <= MAX_ID else None
        if match is None:
            raise CaseError(f"case id {text!r:.{MAX_ID}} does not parse; wanted e.g. {EXAMPLE_ID}")
        given = {**NEUTRAL, **{name: value for name, value in match.groupdict().items() if value is not None}}
        case = cls.of(given)
        if case.id != text.strip():
            raise CaseError(f"case id {text!r} is not canonical; write {case.id}")
        case.check()
        return case

    def check(self) -> None:
        """UnknownName or CaseError if this case cannot exist."""
        for kind, name, known in (
            ("op", self.op, tuple(OPS)),
            ("routing", self.routing, tuple(RULES)),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("activation format", self.activation_format, ACTIVATION_FORMATS),
            ("fill", self.fill, FILLS),
            ("skew", self.skew, SKEWS),
            ("bias", self.bias, BIASES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if name not in known:
                raise UnknownName(kind, name, known)
        if problem := self.problem():
            raise CaseError(f"case {self.id} is impossible: {problem}")

    def problem(self) -> str | None:
        """Why this combination cannot exist, or None."""
        return next((reason for limit in limits_of(self.op) if (reason := limit.refuses(self))), None)

    @property
    def exact(self) -> bool:
        """Is no rounding to change anything: is it the exact fill, or a probe?"""
        return self.fill not in ("real", "edges")

    @property
    def routed(self) -> Shape:
        """The sizes as the router sees them: without fused shared experts and their slots."""
        shared = RULES[self.routing].shared
        return replace(self.shape, experts=self.shape.experts - shared, top_k=self.shape.top_k - shared)

    @property
    def scaled(self) -> bool:
        """May routing weights of the exact fill be other than equal shares of 1?"""
        rule = RULES[self.routing]
        return rule.scale.as_integer_ratio()[0] > 1 or rule.shared > 0

    @property
    def axes(self) -> dict[str, int | str]:
        """The case as one value per axis name, as plans and configurations speak of it."""
        given = ("op", "routing", "activation", "fill", "skew", "seed", "bias", "weighting")
        names = {name: getattr(self, name) for name in given}
        return {**vars(self.shape), **names, "recipe": str(self.recipe)}

    def vary(self, **axes: int | str) -> Case:
        """A copy with some axes replaced, `recipe` given as text."""
        recipe = Recipe.parse(str(axes.pop("recipe", self.recipe)))
        shape = {k: axes.pop(k) for k in vars(self.shape) if k in axes}
        return replace(self, shape=replace(self.shape, **shape), recipe=recipe, **axes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Limit:
    """A rule that forbids cases, looking only at the named axes: `refuses(case)` is the reason or None."""

    axes: tuple[str, ...]
    refuses: Callable[[Case], str | None]

    @classmethod
    def only(cls, axis: str, value: int | str) -> Limit:
        """Allows one value of an axis."""
        return cls((axis,), lambda case: None if case.axes[axis] == value else f"wants {axis} {value}")


EXAMPLE_ID = "moe.nvfp4.t33.h7168.i512.e384.k8.deepseek_v3.swiglu.standard.exact.s0"


def _sizes(case: Case) -> str | None:
    shape = case.shape
    if min(shape.hidden, shape.inter, shape.experts, shape.top_k) < 1:
        return "hidden, inter, experts and top_k must be at least 1"
    if shape.experts > MAX_EXPERTS:
        return f"at most {MAX_EXPERTS} experts, got {shape.experts}"
    return None


def _elements(case: Case) -> str | None:
    shape = case.shape
    if 2 * shape.inter * shape.hidden >= MAX_ELEMENTS or shape.tokens * shape.hidden >= MAX_ELEMENTS:
        return f"a tensor of {MAX_ELEMENTS} elements or more"
    return None


def _top_k(case: Case) -> str | None:
    if case.shape.top_k > case.shape.experts:
        return f"top_k {case.shape.top_k} exceeds experts {case.shape.experts}"
    return RULES[case.routing].problem(case.shape.experts, case.shape.top_k)


def _roles(case: Case) -> str | None:
    recipe = case.recipe
    if not plain(recipe.out):
        return f"recipe {recipe}: the output is written in a plain type, not {recipe.out}"
    for name in (recipe.acts, recipe.middle):
        scaling = all_formats()[name].scaling
        if scaling is not None and (scaling.group[0] not in (1, WHOLE) or scaling.zero_points):
            return (
                f"recipe {recipe}: {name} is a format of weights; activations have scales per tensor, token or group of a row"
            )
    return None


def _whole_groups(case: Case) -> str | None:
    recipe, shape = case.recipe, case.shape
    for what, size, name in (("hidden", shape.hidden, recipe.acts), ("inter", shape.inter, recipe.middle)):
        scaling = all_formats()[name].scaling
        if scaling is None:
            continue
        group = scaling.group[1]
        if group == WHOLE and size < LEAST_QUANTISED:
            return f"{what} {size}: a row that {name} quantises wants at least {LEAST_QUANTISED} values here"
        if group != WHOLE and size % group:
            return f"{what} {size} is not a multiple of {group}: {name} gives a scale to whole groups of a row"
    return None


def _fill(case: Case) -> str | None:
    fills = OPS[case.op].fills
    return None if case.fill in fills else f"{case.op} has no fill {case.fill}, only {', '.join(fills)}"


def _half(case: Case) -> str | None:
    if case.skew == "half" and (case.routed.experts < 2 * case.routed.top_k or RULES[case.routing].groups[0] > 1):
        return "skew half wants routed experts >= 2 * top_k and an ungrouped routing rule"
    return None


def _exact_activation(case: Case) -> str | None:
    if case.exact and not ACTIVATIONS[case.activation].exact:
        return f"{case.activation} has no exact fill: it does not saturate to the identity"
    return None


def _exact_weights(case: Case) -> str | None:
    if not case.exact:
        return None
    rule, top_k = RULES[case.routing], case.routed.top_k
    if top_k & (top_k - 1):
        return f"the exact fill wants a power of two as top_k (weights 1/top_k), got {top_k}{' routed' if rule.shared else ''}"
    routed, shared = rule.units(case.shape.top_k)
    if routed > MAX_EXACT_SCALE:
        return f"the exact fill wants a routed scaling factor of few bits, {case.routing} has {rule.scale}"
    return None if shared <= MAX_SHARED else f"the exact fill has no room for a shared slot of weight 1 beside {top_k} others"


def _exact_middle(case: Case) -> str | None:
    if case.exact:
        try:
            Products.of(case.recipe.weights, case.recipe.middle, ACTIVATIONS[case.activation].gated, case.scaled)
        except ValueError as error:
            return f"recipe {case.recipe} has no exact fill: {error}"
    return None


def _probe_recipe(case: Case) -> str | None:
    if case.fill == "idcode" and not (plain(case.recipe.acts) and plain(case.recipe.middle)):
        return f"recipe {case.recipe}: the idcode fill has no anchors for the scales of quantised activations"
    return None


def _probe_hidden(case: Case) -> str | None:
    if case.fill in ("onehot", "idcode") and case.shape.hidden < LEAST_QUANTISED:
        return f"hidden {case.shape.hidden}: a probe wants at least {LEAST_QUANTISED} columns"
    return None


def _plain_experts(case: Case) -> str | None:
    if case.bias == "bias" and case.fill in PROBES:
        return f"fill {case.fill}: a probe's output shows one weight, a bias would hide it"
    if case.weighting == "oninput" and case.fill != "real":
        return f"fill {case.fill}: weights below 1 on the input would leave the gates where silu rounds"
    if case.bias == "bias" and case.weighting == "oninput":
        return "bias and oninput: no model has both, and kernels disagree on whether the weight multiplies the bias"
    return None


def _weighted_input(case: Case) -> str | None:
    """Where a weight does not depend on its logit, one place of multiplying looks like another."""
    if case.weighting == "oninput" and (case.routed.experts == 1 or (case.routed.top_k == 1 and RULES[case.routing].alone)):
        return f"oninput: {case.routing} gives a lone expert one weight for every token: nothing shows where it is applied"
    return None


def _passed_on(case: Case) -> str | None:
    """max(0, w x) = w max(0, x) for w > 0, and a weight is."""
    if case.weighting == "oninput" and ACTIVATIONS[case.activation].passes_factors:
        return f"oninput: {case.activation} passes a factor on: nothing shows on which side of it the weight is applied"
    return None


def _written(case: Case) -> str | None:
    recipe, scaling = case.recipe, all_formats()[case.recipe.weights].scaling
    if recipe != Recipe.parse(f"{recipe.weights}-{recipe.acts}") or not plain(recipe.acts):
        return f"recipe {recipe}: a quantiser writes one format and reads one plain type"
    rows = scaling is not None and scaling.group[0] in (1, WHOLE) and not scaling.zero_points
    if scaling is None or not rows or (scaling.global_scale and not scaling.static):
        return f"recipe {recipe}: wanted a format with scales per tensor, token or group of a row"
    return None


def _written_groups(case: Case) -> str | None:
    return _whole_groups(replace(case, recipe=replace(case.recipe, acts=case.recipe.weights)))


def _op_elements(case: Case) -> str | None:
    shape = case.shape
    most = shape.tokens * max(shape.hidden, 2 * shape.inter, shape.experts)
    return f"a tensor of {MAX_ELEMENTS} elements or more" if most >= MAX_ELEMENTS else None


def _one_type(case: Case) -> str | None:
    ok = case.recipe == Recipe.parse(case.recipe.weights) and plain(case.recipe.weights)
    return None if ok else f"recipe {case.recipe}: wanted one plain type"


def _no_slot(case: Case) -> str | None:
    return f"{case.routing}: a router has no shared expert; ask the layer" if RULES[case.routing].shared else None


def limits_of(op: str) -> tuple[Limit, ...]:
    """What forbids cases of an op; nothing for one that does not exist."""
    return LIMITS if op == "moe" else OP_LIMITS.get(op, ())


LIMITS = (
    Limit(("hidden", "inter", "experts", "top_k"), _sizes),
    Limit(("tokens", "hidden", "inter"), _elements),
    Limit(("routing", "experts", "top_k"), _top_k),
    Limit(("recipe",), _roles),
    Limit(("recipe", "hidden", "inter"), _whole_groups),
    Limit(("skew", "routing", "experts", "top_k"), _half),
    Limit(("fill", "activation"), _exact_activation),
    Limit(("fill", "routing", "top_k"), _exact_weights),
    Limit(("fill", "recipe", "activation", "routing"), _exact_middle),
    Limit(("fill", "recipe"), _probe_recipe),
    Limit(("fill", "hidden"), _probe_hidden),
    Limit(("fill",), _fill),
    Limit(("fill", "bias", "weighting"), _plain_experts),
    Limit(("routing", "experts", "top_k", "weighting"), _weighted_input),
    Limit(("activation", "weighting"), _passed_on),
)
_SIZES = (Limit(("fill",), _fill), LIMITS[0], Limit(("tokens", "hidden", "inter", "experts"), _op_elements))
OP_LIMITS = {
    "quantize": (*_SIZES, Limit(("recipe",), _written), Limit(("recipe", "hidden"), _written_groups)),
    "activate": (*_SIZES, Limit(("recipe",), _one_type), Limit(("fill", "activation"), _exact_activation)),
    "route": (
        *(*_SIZES, Limit(("recipe",), _one_type), Limit(("routing", "experts", "top_k"), _top_k)),
        *(Limit(("skew", "routing", "experts", "top_k"), _half), Limit(("fill", "routing", "top_k"), _exact_weights)),
        Limit(("routing",), _no_slot),
    ),
}
