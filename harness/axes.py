"""The axes of a case: what each may be, in which order an id names them, which ops have which. Pure data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

ACTIVATION_FORMATS = ("standard", "batched")  # batched: [experts, rows, hidden] slabs and masked_m, made by the adapter
PROBES = ("onehot", "idcode")  # exact fills of a layer, harness/idcode.py
FILLS = ("exact", "real", *PROBES, "edges")  # edges: zeros, ties, subnormals and the largest numbers, harness/op_fills.py
SKEWS = ("uniform", "hot", "half")  # half: the upper half of the experts never receives a token; hot: one gets every token
BIASES = ("nobias", "bias")  # bias: every expert adds one to the sums of either GEMM (gpt-oss)
WEIGHTINGS = ("onoutput", "oninput")  # oninput: routing weights multiply what the experts read, not what they give (Llama-4)
_SIZES = ("tokens", "hidden", "inter", "experts", "top_k")
AXES = ("op", *_SIZES, "routing", "activation", "recipe", "fill", "skew", "seed", "bias", "weighting")


@dataclass(frozen=True)
class Op:
    """A kind of question: the axes of its cases beside the seed, in the order of an id, and its fills. On every other axis a
    case of it has the NEUTRAL value."""

    axes: tuple[str, ...]
    fills: tuple[str, ...]


_FRONT = ("recipe", "tokens", "hidden", "inter", "experts", "top_k")
OPS = {
    "moe": Op(
        (*_FRONT, "routing", "activation", "activation_format", "fill", "skew", "bias", "weighting"), ("exact", "real", *PROBES)
    ),
    "quantize": Op(("recipe", "tokens", "hidden", "fill"), ("real", "edges")),
    "activate": Op(("recipe", "tokens", "inter", "activation", "fill"), ("exact", "real")),
    "route": Op(("recipe", "tokens", "experts", "top_k", "routing", "fill", "skew"), ("exact", "real", "edges")),
}
NEUTRAL: Mapping[str, int | str] = {
    **{"tokens": 1, "hidden": 1, "inter": 1, "experts": 1, "top_k": 1, "routing": "default", "activation": "identity"},
    **{"recipe": "fp32", "fill": "real", "skew": "uniform", "activation_format": "standard", "seed": 0},
    **{"bias": "nobias", "weighting": "onoutput"},
}
OPTIONAL = ("skew", "bias", "weighting")  # left out of an id where they have the NEUTRAL value
LETTERS = {"tokens": "t", "hidden": "h", "inter": "i", "experts": "e", "top_k": "k", "seed": "s"}


def _pattern(op: Op) -> re.Pattern[str]:
    texts = {name: rf"\.{letter}(?P<{name}>\d+)" for name, letter in LETTERS.items()}
    texts |= {"recipe": r"\.(?P<recipe>[\w-]+)", "fill": r"\.(?P<fill>[a-z]+)"}
    texts |= {name: rf"(?:\.(?P<{name}>{'|'.join(values)}))?" for name, values in (("bias", BIASES), ("weighting", WEIGHTINGS))}
    texts["skew"] = rf"(?:\.(?!(?:{'|'.join((*BIASES, *WEIGHTINGS))})\.)(?P<skew>[a-z]+))?"
    return re.compile(r"(?P<op>[a-z]\w*)" + "".join(texts.get(a, rf"\.(?P<{a}>[a-z]\w*)") for a in (*op.axes, "seed")))


IDS = {name: _pattern(op) for name, op in OPS.items()}
