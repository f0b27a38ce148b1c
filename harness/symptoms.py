"""Hypotheses that need nothing but the right output: what became of it, told as seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.evidence import OWN, Claim, Evidence, where

ENOUGH = 8  # non-zero elements that a factor is read from, rows that columns are told apart by
MAX_COLUMNS = 2048  # columns of which any permutation is searched: a matrix of their similarities
BLOCKS = (8, 16, 32, 64, 128, 256)  # columns within which layouts shuffle (reference/layouts)
FACTORS = (2, 4, 8, 16, 32, 64)  # and into how many strands
AT_BOUND = 4  # elements at one value before it is called a bound
POWER = 0.01  # of log2: how close to 2**k a factor is called 2**k


def symptoms(e: Evidence) -> Iterator[Claim | None]:
    """Every claim that the output alone supports."""
    yield _zeros(e)
    yield from _row_permutations(e)
    yield from _column_permutations(e)
    yield _global_factor(e)
    yield _row_factors(e)
    yield _clamped(e)


def non_finite(e: Evidence) -> Claim | None:
    """NaN or inf where a number was due; from uninitialised memory only if a finding says that the output depends on it."""
    wrong = ~e.actual.isfinite() & ~e.expected.ambiguous[:, None]
    if not wrong.any():
        return None
    nan = int((e.actual.isnan() & wrong).sum())
    text = f"{nan} NaN and {int(wrong.sum()) - nan} inf, {where(wrong)}"
    evidence = {"nan": nan, "inf": int(wrong.sum()) - nan, "experts": list(e.common_experts)}
    poison = e.finding("poison")
    if poison is not None and nan:
        return Claim("nan_from_padding", f"{text}; the output depends on what uninitialised memory held", 1.0, 0.0, evidence)
    return Claim("non_finite", text, 1.0, 0.0, evidence)


def never_written(e: Evidence) -> Claim | None:
    """Every bad element is a NaN that a second call, with another poison in unwritten memory, replaced by that poison."""
    if e.finding("never_written") is None or not bool(e.actual[e.bad].isnan().all()):
        return None
    text = f"the elements hold what memory held before the call: never written, or copied from there, {where(e.bad)}"
    return Claim("never_written", text, 1.0, 0.0, {"elements": int(e.bad.sum())})


def _zeros(e: Evidence) -> Claim | None:
    if not (e.actual[e.bad] == 0).all():
        return None
    whole = not e.actual.any()
    text = "the whole output is zero: never written?" if whole else f"zeros, {where(e.bad)}"
    claim = e.claim("zeros", text, torch.where(e.bad, 0.0, e.value)[e.rows], {"whole": whole})
    return None if claim is None else Claim(**{**vars(claim), "late": not whole})


def _row_permutations(e: Evidence) -> Iterator[Claim | None]:
    """Each hit row equals another hit row's expected one, or all lie a constant number of rows away; one alone, any other's."""
    tokens, rows = len(e.value), e.rows
    if tokens < 2 or len(rows) == 0:
        return
    step = -(-e.value.shape[1] // MAX_COLUMNS)
    source = _cosine(e.actual[rows, ::step], e.value[:, ::step]).argmax(-1)
    shift = int(((source - rows) % tokens).mode().values)
    yield _moved_rows(e, (rows + shift) % tokens, shift if shift <= tokens // 2 else shift - tokens)
    whole = len(rows) == int(e.hit.sum())
    if whole and torch.equal(source.sort().values, rows) and not (source == rows).any():
        yield _moved_rows(e, source, None)


def _moved_rows(e: Evidence, source: Tensor, shift: int | None) -> Claim | None:
    if shift == 0:
        return None
    moves = [[int(r), int(s)] for r, s in zip(e.rows, source, strict=True)]
    told = ", ".join(f"{r} holds {s}" for r, s in moves[:4]) + (", ..." if len(moves) > 4 else "")
    by = "" if shift is None else f", all shifted by {shift}"
    text = f"{int(e.hit.sum())} rows are other tokens' rows ({told}{by})"
    return e.claim("row_permutation", text, e.value[source], {"shift": shift, "moves": moves[:16]})


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def _column_permutations(e: Evidence) -> Iterator[Claim | None]:
    actual, value, size = e.actual[e.rows], e.value[e.rows], e.value.shape[1]
    if not bool(actual.isfinite().all()) or size < 2:
        return
    shift = _best_shift(actual, value)
    name = "the halves are exchanged" if 2 * shift == size else f"all shifted by {shift if 2 * shift <= size else shift - size}"
    if shift:
        yield e.claim("column_permutation", f"the columns are moved: {name}", value.roll(shift, 1), {"shift": shift})
    index = torch.arange(size)
    for text, source, evidence in _shuffles(index):
        yield e.claim("column_permutation", f"the columns are moved: {text}", value[:, source], evidence)
    if len(actual) >= ENOUGH and size <= MAX_COLUMNS:
        yield _any_columns(e, actual, value)


def _best_shift(actual: Tensor, value: Tensor) -> int:
    """The cyclic shift of the columns at which actual [n, columns] and value correlate best."""
    spectrum = torch.fft.rfft(actual) * torch.fft.rfft(value).conj()
    return int(torch.fft.irfft(spectrum.sum(0), n=actual.shape[1]).argmax())


def _shuffles(index: Tensor) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(words, source column of every column, evidence) of the permutations that layouts are made of."""
    size = len(index)
    for block in dict.fromkeys((size, *(b for b in BLOCKS if b < size and size % b == 0))):
        inside = "" if block == size else f" within blocks of {block}"
        for factor in dict.fromkeys(f for f in (*FACTORS, block // 2) if 1 < f < block and block % f == 0):
            strands = index.view(-1, factor, block // factor).transpose(1, 2).flatten()
            yield f"interleaved by {factor}{inside}", strands, {"interleave": factor, "block": block}
        yield f"reversed{inside}", index.view(-1, block).flip(1).flatten(), {"reversed": block}
        if block % 2 == 0 and block < size:
            halves = index.view(-1, 2, block // 2).flip(1).flatten()
            yield f"halves exchanged{inside}", halves, {"halves": block}
    if size % 2 == 0:
        yield "neighbours exchanged", index.view(-1, 2).flip(1).flatten(), {"halves": 2}


def _any_columns(e: Evidence, actual: Tensor, value: Tensor) -> Claim | None:
    """Any permutation, found by matching columns; a column of zeros stays where it is."""
    live = actual.abs().sum(0) > 0
    source = _cosine(actual.T, value.T).argmax(-1)
    source[~live] = torch.arange(len(source))[~live]
    moved = source != torch.arange(len(source))
    if len(source[live].unique()) < int(live.sum()) or not bool(moved.any()):
        return None
    places = moved.nonzero().flatten()[:16]
    moves = [[int(c), int(source[c])] for c in places]
    told = ", ".join(f"{c} holds {s}" for c, s in moves[:4])
    text = f"the columns are moved: {int(moved.sum())} of {len(moved)} ({told}, ...)"
    claim = e.claim("column_permutation", text, value[:, source], {"moves": moves})
    return None if claim is None else Claim(**{**vars(claim), "late": True})


def _global_factor(e: Evidence) -> Claim | None:
    value, seen = e.value[e.rows], e.actual[e.rows]
    finite = seen.isfinite()
    if int((value[finite] != 0).sum()) < ENOUGH:
        return None
    factor = float((value * seen)[finite].sum() / value[finite].square().sum())
    if factor == 0 or _unlike(seen[finite], value[finite]):
        return None
    text = f"{int(e.hit.sum())} rows are {named(factor)} times the expected: a scale twice, missing, or another expert's?"
    return e.claim("constant_factor", text, value * factor, {"factor": factor, "scope": "all hit rows", **_power(factor)})


def _row_factors(e: Evidence) -> Claim | None:
    value, seen = e.value[e.rows], e.actual[e.rows]
    if len(e.rows) < 2 or bool(((value != 0).sum(-1) < ENOUGH).any()) or not bool(seen.isfinite().all()):
        return None
    factors = (value * seen).sum(-1) / value.square().sum(-1)
    if bool((factors == 0).any()) or _unlike(seen, value * factors[:, None]):
        return None
    told = ", ".join(f"{named(f)} in row {int(r)}" for r, f in list(zip(e.rows, factors.tolist(), strict=True))[:3])
    text = f"{int(e.hit.sum())} rows are the expected times a factor of their own ({told}, ...)"
    claim = e.claim("constant_factor", text, value * factors[:, None], {"factors": factors.tolist()[:16], "scope": "row"})
    return None if claim is None else Claim(**{**vars(claim), "late": True})


def _unlike(seen: Tensor, multiple: Tensor) -> bool:
    """Whether what was seen does not look like a multiple: next to nothing is close to a small one of anything."""
    return abs(float((seen * multiple).sum())) < math.sqrt(1 - OWN**2) * float(seen.norm() * multiple.norm())


def named(factor: float) -> str:
    """A factor in words; a power of two is called so."""
    power = _power(factor)
    return f"{factor:.4g}" + (f" (2**{power['power']})" if power else "")


def _power(factor: float) -> dict[str, Any]:
    log = math.log2(abs(factor)) if factor else math.nan
    return {"power": round(log)} if math.isfinite(log) and abs(log - round(log)) < POWER and round(log) else {}


def _clamped(e: Evidence) -> Claim | None:
    """The bad elements sit at the smallest or the largest value of the output, and the expected ones lie beyond."""
    seen = e.actual[e.rows]
    low, high = float(seen.min()), float(seen.max())
    bad = e.actual[e.bad]
    at_low, at_high = int((bad == low).sum()), int((bad == high).sum())
    if low == high or at_low + at_high < len(bad) or max(at_low, at_high) < AT_BOUND:
        return None
    bounds: dict[str, Any] = {name: at for name, at, n in (("min", low, at_low), ("max", high, at_high)) if n}
    text = "the output is clamped: " + ", ".join(f"{name} {at:g}" for name, at in bounds.items())
    return e.claim("clamped", text, e.value[e.rows].clamp(**bounds), bounds)
