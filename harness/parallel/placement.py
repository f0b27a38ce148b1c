"""Which rank has which tokens and which experts: contiguous shares, the first ones larger by one where they do not divide."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """`tokens` and `experts` of a layer over `ranks`. slots: a packet is one slot of a token (its row and one expert), and the
    routing weights are applied at home; else it is a token with all its slots, once to every rank with one of its experts."""

    ranks: int
    tokens: int
    experts: int
    slots: bool

    def tokens_of(self, rank: int) -> range:
        """The tokens whose rows a rank has and wants back."""
        return share(self.tokens, self.ranks, rank)

    def experts_of(self, rank: int) -> range:
        """The experts whose weights a rank has."""
        return share(self.experts, self.ranks, rank)


def share(total: int, ranks: int, rank: int) -> range:
    """Of `total` things, those of a rank: as vLLM's determine_expert_map deals experts."""
    each, more = divmod(total, ranks)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))
