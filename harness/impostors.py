"""The trust guard: wrong kernels that a case must reject, or its verdict says nothing.

A wrong kernel is judged like a subject, at the tokens the oracle sampled. Rejected there, it is rejected; not rejected
there, it counts as passing. A wrong tile must show wherever it lies: each tile of the output is tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.compare import compare, mean_z2_limit, z_limit
from harness.oracle import Expected

TILE = 64  # rows and columns of a small output tile of a grouped GEMM


def passing(expected: Expected, out: torch.dtype, tiles: bool = True) -> list[str]:
    """Names of the impostors whose output in dtype `out` the comparison would accept; wrong tiles among them on request."""
    there, wrong = at(expected, expected.sampled), {name: output.to(out) for name, output in expected.impostors.items()}
    if there.exact or there.baseline is None:
        rejected = _rejected_together(there, list(wrong.values()), len(expected.value))
    else:
        rejected = [_rejected(there, output, len(expected.value)) for output in wrong.values()]
    found = [name for name, seen in zip(wrong, rejected, strict=True) if not seen]
    return found + unseen_tiles(expected, out) if tiles else found


def at(expected: Expected, tokens: Tensor) -> Expected:
    """What is expected at tokens [n] alone; every tensor with a row per token is cut."""
    return expected if len(tokens) == len(expected.value) else expected.rows(tokens)


def _rejected_together(expected: Expected, wrong: list[Tensor], tokens: int) -> list[bool]:
    """`_rejected` of all of them at once, where the lane is exact or real: what `harness.compare` says of their z."""
    judged = ~expected.ambiguous
    if not wrong or not bool(judged.any()):
        return [False] * len(wrong)
    actual = torch.stack([expected.read(output).double() for output in wrong])[:, judged]
    error, finite = (actual - expected.value[judged]).abs(), actual.isfinite()
    z = torch.where(error == 0, 0.0, error / expected.sigma[judged]).where(finite, torch.inf).flatten(1)
    limit = 0.0 if expected.exact else z_limit(tokens * actual.shape[-1])
    squares = torch.where(finite.flatten(1), z, 0.0).square().sum(-1) / finite.flatten(1).sum(-1).clamp(min=1)
    beyond = (z > limit).any(-1) | (squares > mean_z2_limit(float(expected.independent.sum())))
    return [bool(seen) for seen in beyond.tolist()]


def _rejected(expected: Expected, wrong: Tensor, tokens: int) -> bool:
    """Whether the comparison of the whole case would reject it too: its limit on z grows with the number of elements."""
    found = compare(expected, wrong)
    if found.agrees or found.lane != "real":
        return not found.agrees
    return found.worst > z_limit(tokens * wrong.shape[1]) or found.mean_z2 > found.mean_z2_limit


def unseen_tiles(expected: Expected, out: torch.dtype) -> list[str]:
    """ "wrong_tile (...)" for a tile of the output that could be zero, or hold its neighbour, without being noticed."""
    value = expected.value
    rows, columns = value.shape
    width = min(TILE, max(1, columns // 2))
    limit = 0.0 if expected.exact else z_limit(int((~expected.ambiguous).sum()) * columns)
    wrong = {"zeros": torch.zeros_like(value)}
    if columns > 1:
        wrong["the tile beside it"] = value.roll(width, 1)
    found = []
    for holds, output in wrong.items():
        error = (output.to(out).double() - value).abs()
        seen = (error > limit * expected.sigma) & ~expected.ambiguous[:, None]
        tiles = torch.nn.functional.max_pool2d(seen[None].float(), (min(TILE, rows), width), ceil_mode=True)[0]
        if not bool(tiles.all()):
            row, column = (tiles == 0).nonzero()[0].tolist()
            found.append(f"wrong_tile (rows {row * TILE}.., columns {column * width}.. hold {holds})")
    return found
