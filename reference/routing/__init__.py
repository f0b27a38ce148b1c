"""Routing rules: logits -> which experts, with which weights, and how close the next expert came.

Rules carry names, never numbers: the numbers of FlashInfer and vLLM differ (9 is TopKSigmoid in one and Unspecified in the
other). RULES holds what needs logits and a bias only; `hash_topk` needs token ids too.
"""

from __future__ import annotations

from reference.routing.flat import FLAT
from reference.routing.grouped import GROUPED
from reference.routing.keys import select_by_key, sort_keys
from reference.routing.legal import legal
from reference.routing.rule import Routing, Rule, Slack, select, with_shared
from reference.routing.shared import SHARED
from reference.routing.softplus import SOFTPLUS, hash_topk

RULES = {rule.name: rule for rule in (*FLAT, *GROUPED, *SOFTPLUS, *SHARED)}

__all__ = ["RULES", "Routing", "Rule", "Slack", "hash_topk", "legal", "select", "select_by_key", "sort_keys", "with_shared"]
