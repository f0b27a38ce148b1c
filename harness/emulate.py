"""A right kernel, in torch: the layer in float32 with declared rounding points, its sums in another order than the oracle's."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.inputs import Inputs
from harness.oracle import handed, weight_source
from reference.activation import ACTIVATIONS
from reference.experts import ExpertWeights
from reference.formats import get
from reference.rounding import Rounding

SPLITS = (1, 2, 3, 4, 8)  # of K, each summed by itself as split-K kernels do


def emulate(inputs: Inputs, rounding: Rounding, seed: int = 0) -> Tensor:
    """[tokens, hidden] of the recipe's output type. `seed` decides the order of K, of the experts and of the split."""
    shape, ids, rounding = inputs.case.shape, inputs.topk_ids, handed(rounding, inputs)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(shape.tokens, shape.top_k, shape.hidden, dtype=torch.float32)
    source, on_input = weight_source(inputs), inputs.case.weighting == "oninput"
    for expert in ids.unique()[torch.randperm(len(ids.unique()), generator=generator)].tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        x = rounding.at("x", inputs.x[token].double()).float()
        if on_input:
            x = x * rounding.at("routing_weight", inputs.topk_weights[token, slot, None]).float()
            x = rounding.at("weighted_x", x.double()).float()
        rows[token, slot] = _expert(inputs, x, source(expert), rounding, generator)
    weights = torch.ones_like(inputs.topk_weights) if on_input else inputs.topk_weights
    return _combined(rows, weights, rounding).to(get(inputs.case.recipe.out).torch_dtype)


def _expert(inputs: Inputs, x: Tensor, weights: ExpertWeights, rounding: Rounding, generator: torch.Generator) -> Tensor:
    activation = ACTIVATIONS[inputs.case.activation]

    def gemm(point: str, a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        product = rounding.at("product", _matmul(a, w, generator)).float()
        return rounding.at(point, product if bias is None else product + bias.float()).float()

    gate = gemm("gate_up", x, weights.gate, weights.gate_bias)
    middle = rounding.at("activated", activation.scalar(gate)).float()
    if weights.up is not None:
        middle = middle * activation.linear(gemm("gate_up", x, weights.up, weights.up_bias))
    middle = rounding.at("middle", middle).float()
    return gemm("row", middle, weights.down, weights.down_bias)


def _matmul(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """a [rows, K] @ b [columns, K].T in float32, K shuffled and split."""
    order = torch.randperm(a.shape[1], generator=generator)
    splits = SPLITS[int(torch.randint(len(SPLITS), (), generator=generator))]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for part in order.tensor_split(splits):
        total += a[:, part] @ b[:, part].float().T
    return total


def _combined(rows: Tensor, weights: Tensor, rounding: Rounding) -> Tensor:
    weights = rounding.at("routing_weight", weights).float()
    total = torch.zeros_like(rows[:, 0])
    for k in range(rows.shape[1]):
        weighted = rounding.at("weighted", rows[:, k] * weights[:, k, None]).float()
        total = rounding.at("partial", total + weighted).float()
    return rounding.at("out", total)
