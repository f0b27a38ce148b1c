"""The bitmatrix of triton_kernels: one bit per (token, expert), expert e in bit e % 32 of word e // 32.

What -1 does depends on the division: floor puts it into word -1, which no word is; C truncates to word 0 and shifts by
-1 % 32, which hardware reads as 31, so expert 31 gains a token. A guard on the id avoids both.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
DIVISIONS = ("guarded", "floor", "c")


def bitmatrix(ids: Tensor, experts: int, division: str = "guarded") -> Tensor:
    """ids [tokens, top_k] -> words [tokens, ceil(experts / 32)] int64 in [0, 2**32). `guarded` ignores ids outside
    [0, experts); `floor` and `c` are what unguarded kernels do, also to ids between experts and the end of the last word."""
    if division not in DIVISIONS:
        raise ValueError(f"division {division!r} unknown; known: {', '.join(DIVISIONS)}")
    ids, words = ids.long(), -(-experts // WORD)
    word = ids.div(WORD, rounding_mode="trunc" if division == "c" else "floor").long()
    bit = ids & (WORD - 1)  # also what a shift by the negative remainder of C does on hardware
    seen = (word >= 0) & (word < words)
    if division == "guarded":
        seen = (ids >= 0) & (ids < experts)
    cell = torch.where(seen, word * WORD + bit, words * WORD)
    bits = torch.zeros(len(ids), words * WORD + 1, dtype=torch.int64, device=ids.device).scatter(-1, cell, 1)
    weight = torch.ones(WORD, dtype=torch.int64, device=ids.device) << torch.arange(WORD, device=ids.device)
    return (bits[:, :-1].reshape(len(ids), words, WORD) * weight).sum(-1)


def unpack(words: Tensor, experts: int) -> Tensor:
    """[tokens, experts] bool of words [tokens, ceil(experts / 32)]: bits beyond the last expert are dropped."""
    bit = torch.arange(WORD, device=words.device)
    return (words.unsqueeze(-1) >> bit & 1).flatten(-2)[:, :experts].bool()


def histogram(words: Tensor, experts: int) -> Tensor:
    """Tokens per expert [experts] int64. A token that names an expert twice counts once: a set has no multiplicity."""
    return unpack(words, experts).sum(0)


def stored(words: Tensor) -> Tensor:
    """uint32 [words, tokens rounded up to 32] as triton_kernels allocates it: one word of all tokens after another."""
    tokens, count = words.shape
    padded = torch.zeros(count, -(-tokens // WORD) * WORD, dtype=torch.int64, device=words.device)
    padded[:, :tokens] = words.T
    return padded.to(torch.uint32)
