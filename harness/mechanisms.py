"""Hypotheses about what went wrong inside the layer, tested by computing the layer with just that wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harness.evidence import Claim, Evidence
from harness.misread import misreadings
from harness.misrouting import Misrouted
from harness.mistakes import known_mistakes
from harness.symptoms import named
from harness.whatif import Layer, Mistake, Study, spread
from reference.routing import RULES, Routing

MAX_TOKENS = 64  # hit rows at which wrong layers are computed
SEARCHED = 4  # of them, at which every expert of the layer is tried
SCREENED = 2  # of them, at which every misreading of the weights is tried; what explains these is asked about the others
UNEVEN = 1e-3  # an expert's factor closer to 1 than this is 1: the rounding of bf16 moves it by less
RULE = 3  # experts that must follow a rule before it is called one
MOST = 0.5  # share of the rows that a rule for all experts hits: the others would be wrong as well
CLOSE = 0.1  # how far from 0, 1 or 2 an expert's weight in the output may be read
FAINT = 1e-3  # energy of an expert's share, relative to its row's error, below which its weight cannot be read
ALONG = 0.5  # share of an error's energy along the experts' own rows above which the weights are to blame, not rounding
CERTAIN = 3.0  # standard deviations within which a faint mistake's share in an error must be 1
SUSPECT = 6.0  # standard deviations of a mistake's share in an error before rounding is no longer blamed for it


class Inside:
    """A failed comparison with the layer at hand. Every list of tokens is of hit rows, those that can be afforded."""

    def __init__(self, e: Evidence, layer: Layer) -> None:
        self.e, self.layer = e, layer
        self.parts = [self._study([m for m in known_mistakes(layer.case) if m.dear == dear]) for dear in (False, True)]

    def _study(self, mistakes: list[Mistake]) -> tuple[list[Mistake], Study] | None:
        tokens = spread(self.e.hit.nonzero().flatten(), min(MAX_TOKENS, self.layer.affordable(mistakes)))
        return (mistakes, self.layer.study(tokens, mistakes, self.e.common_experts)) if len(tokens) else None

    @property
    def cheap(self) -> Study | None:
        """The study of the mistakes that need no weights of their own: it has the most tokens."""
        return None if self.parts[0] is None else self.parts[0][1]

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """(ids, routing weights) [n, top_k] of the cheap study's tokens."""
        assert self.cheap is not None
        routing = self.e.expected.routing
        return routing.ids[self.cheap.tokens], routing.weights[self.cheap.tokens]

    def claims(self) -> Iterator[Claim | None]:
        """Every claim that needs the layer."""
        for part in self.parts:
            if part is not None:
                yield from self._mistakes(*part)
        if self.cheap is not None:
            yield from Slots(self.e, self.cheap, *self.weights).claims()
            yield from self._weightings(self.cheap)
            yield self._unbiased(self.cheap.tokens)
            yield from self._other_experts(self.cheap.tokens)

    def last_claims(self) -> Iterator[Claim | None]:
        """Claims that are too dear to ask where others explain the error."""
        misrouted = Misrouted.of(self.e, self.layer)
        found = list(misrouted.claims()) if misrouted is not None else []
        if self.cheap is not None:
            found.append(Slots(self.e, self.cheap, *self.weights).other_weights())
        yield from found if any(found) else self._misread()

    def _misread(self) -> Iterator[Claim | None]:
        """Weights and scales read wrongly: whatever explains a few rows is asked about more."""
        mistakes = list(misreadings(self.layer.case))
        tokens = spread(self.e.hit.nonzero().flatten(), min(SCREENED, self.layer.affordable(mistakes)))
        if len(tokens) == 0 or not self.layer.experts_affordable(len(tokens)):
            return
        deltas = self.layer.study(tokens, mistakes).deltas
        value = self.e.value[tokens]
        likely = [mistakes[i] for (i, _), d in deltas.items() if bool((d != 0).any()) and self.e.leaves(value + d, tokens)]
        if likely and (asked := self._study(likely)) is not None:
            yield from self._mistakes(*asked)

    def _mistakes(self, mistakes: list[Mistake], study: Study) -> Iterator[Claim | None]:
        value = self.e.value[study.tokens]
        for (index, scope), delta in study.deltas.items():
            if not bool((delta != 0).any()):
                continue
            m = mistakes[index]
            kind, text, evidence = m.kind, m.text, dict(m.evidence)
            if scope is not None:
                text, evidence = f"{text}, in expert {scope} only", {**evidence, "expert": scope}
            if kind == "expert_permutation" and (scope is not None or self._few(study.tokens)):
                kind = "wrong_expert"
            claim = self.e.claim(kind, text, value + delta, evidence, study.tokens)
            yield None if claim is None else replace(claim, late=kind == "constant_factor")

    def _few(self, tokens: Tensor) -> bool:
        """Whether these tokens' experts, or the rows hit, are too few to tell a rule for all experts from a coincidence."""
        hit = self.e.hit.double().mean().item()
        return hit <= MOST or len(self.e.expected.routing.ids[tokens].unique()) < RULE

    def suspects(self) -> bool:
        """Whether some mistake's effect is in the error, too faint to be named but too clear to call the error rounding."""
        return self._along_rows() > ALONG or any(trace.share > 0.5 for trace in self.traces)

    def faint(self) -> Claim | None:
        """A mistake hardly larger than the noise, if it is in the error as a whole, the output would be right without it, and
        no mistake of another kind comes near. Asked where the noise is known: in the real lane."""
        if self.e.comparison.lane != "real":
            return None
        limit = self.e.comparison.limit**2
        fits = [t for t in self.traces if abs(t.share - 1) < t.tolerance and float(t.left.max()) <= limit]
        best = min((float(t.left.sum()) for t in fits), default=0.0)
        near = [t for t in fits if float(t.left.sum()) <= best + SUSPECT**2]
        if len({t.mistake.kind for t in near}) != 1 or float(near[0].left.mean()) > self.e.comparison.mean_z2_limit:
            return None
        found = min(near, key=lambda t: float(t.left.sum()))
        where = "" if found.scope is None else f", in expert {found.scope} only"
        text = f"{found.mistake.text}{where}: faint, but without it the output would be right"
        return Claim(found.mistake.kind, text, min(1.0, found.share), best, {**found.mistake.evidence, "faint": True})

    @cached_property
    def traces(self) -> list[Trace]:
        """The mistakes whose effect stands out of the error's own noise."""
        found = []
        for mistakes, study in (part for part in self.parts if part is not None):
            sigma = self.e.expected.sigma[study.tokens]
            error = (self.e.actual - self.e.value)[study.tokens] / sigma
            for (index, scope), delta in study.deltas.items():
                shape = delta / sigma
                length = float(shape.norm())
                share = float((error * shape).sum()) / length**2 if length > 0 else 0.0
                if share * length > SUSPECT * float(error.square().mean().sqrt()):
                    tolerance = max(CLOSE, CERTAIN / length)
                    found.append(Trace(mistakes[index], scope, share, tolerance, (error - shape).square()))
        return found

    def _along_rows(self) -> float:
        """The share of the error that other weights of the right rows would explain, in energy; of rounding: top_k / hidden."""
        if self.cheap is None:
            return 0.0
        at, rows = self.cheap.tokens, self.cheap.rows
        error = (self.e.actual - self.e.value)[at]
        along = rows @ error[..., None]
        fitted = torch.linalg.pinv(rows @ rows.transpose(1, 2), hermitian=True) @ along
        return float((along * fitted).sum() / error.square().sum())

    def _weightings(self, study: Study) -> Iterator[Claim | None]:
        """Other routing weights on the right rows."""
        ids, weights = self.weights
        logits = self.layer.inputs.logits.cpu()[study.tokens].double()
        routed = self.layer.case.routed.top_k
        chosen, fused = ids[:, :routed], weights[:, routed:]
        ways = {
            "not applied": torch.ones_like(weights),
            "applied twice": weights.square(),
            "not renormalised (softmax over all experts)": torch.cat((logits.softmax(-1).gather(1, chosen), fused), 1),
            "not renormalised (sigmoid)": torch.cat((logits.sigmoid().gather(1, chosen), fused), 1),
            "renormalised to a sum of 1": weights / weights.sum(-1, keepdim=True),
            "softmax over the chosen experts": torch.cat((logits.gather(1, chosen).softmax(-1), fused), 1),
            "in reverse order of the slots": weights.flip(-1),
            "those of a token's first slot in all its slots": weights[:, :1].expand_as(weights),
        }
        for way, used in ways.items():
            if not torch.equal(used, weights):
                prediction = (study.rows * used[..., None]).sum(1)
                yield self.e.claim("unweighted", f"the routing weights are {way}", prediction, {"applied": way}, study.tokens)

    def _unbiased(self, tokens: Tensor) -> Claim | None:
        """Routing without the selection bias."""
        inputs, rule = self.layer.inputs, RULES[self.layer.case.routing]
        if inputs.bias is None:
            return None
        without = rule(inputs.logits, torch.zeros_like(inputs.bias), self.layer.case.shape.top_k)
        at = tokens.to(inputs.device)
        mine = Routing(without.ids[at], without.weights[at], without.margin[at])
        if torch.equal(mine.ids, inputs.routing.ids[at]) and torch.equal(mine.weights, inputs.routing.weights[at]):
            return None
        prediction = self.layer.routed(tokens, mine)
        return self.e.claim("missing_bias", "the experts are chosen without the routing bias", prediction, {}, tokens)

    def _other_experts(self, tokens: Tensor) -> Iterator[Claim | None]:
        """Every shift of the expert ids, their reversal, and any one expert in another's place."""
        tokens, count = tokens[:SEARCHED], self.layer.case.shape.experts
        if count < 2 or not self.layer.experts_affordable(len(tokens)):
            return
        rows = torch.stack([self.layer.expert_rows(expert, tokens) for expert in range(count)])
        ids, weights = (x[: len(tokens)] for x in self.weights)
        at = torch.arange(len(tokens))[:, None]
        kind = "wrong_expert" if self._few(tokens) else "expert_permutation"
        maps = {f"e {shift:+d} (mod {count})": (ids + shift) % count for shift in range(1, count)}
        maps["E - 1 - e"] = count - 1 - ids
        for name, used in maps.items():
            prediction = (rows[used, at] * weights[..., None]).sum(1)
            where = "in these rows " * (kind == "wrong_expert")
            yield self.e.claim(kind, f"{where}expert e is taken for {name}", prediction, {"map": name}, tokens)
        for expert in self.e.common_experts:
            share = torch.where(ids == expert, weights, 0.0).sum(-1)[:, None]
            for other in range(count):
                prediction = self.e.value[tokens] + share * (rows[other] - rows[expert])
                if other != expert:
                    text = f"the rows of expert {expert} are computed with the weights of expert {other}"
                    yield self.e.claim("wrong_expert", text, prediction, {"expert": expert, "used": other}, tokens)


@dataclass(frozen=True)
class Trace:
    """How much of a mistake is in an error, in units of the whole mistake, how well that is known, and z**2 [n, hidden]
    without the whole mistake."""

    mistake: Mistake
    scope: int | None
    share: float
    tolerance: float
    left: Tensor


@dataclass(frozen=True)
class Slots:
    """How much of each slot's right row is in the output: study.rows [n, top_k, hidden] fitted to it, row by row."""

    e: Evidence
    study: Study
    ids: Tensor
    weights: Tensor

    @cached_property
    def shares(self) -> Tensor:
        """[n, top_k]: 1 where a slot counts as it should, 0 where it is missing, NaN where it cannot be read."""
        weighted = self.study.rows * self.weights[..., None]
        gram = weighted @ weighted.transpose(1, 2)
        actual = self.e.actual[self.study.tokens].nan_to_num(0.0, 0.0, 0.0)
        fitted = (torch.linalg.pinv(gram, hermitian=True) @ (weighted @ actual[..., None]))[..., 0]
        error = (actual - self.e.value[self.study.tokens]).square().sum(-1, keepdim=True)
        return torch.where(gram.diagonal(dim1=1, dim2=2) > FAINT * error, fitted, torch.nan)

    def claims(self) -> Iterator[Claim | None]:
        """Slots or experts that are missing, count twice, or have a factor of their own."""
        yield from self._constant_slots()
        by_expert = self._by_expert()
        if by_expert is not None:
            missing = sorted(expert for expert, share in by_expert.items() if abs(share) < CLOSE)
            if missing and (len(missing) < len(by_expert) or not bool(self.e.hit.all()) or not self.e.actual.any()):
                yield from self._missing_experts(missing)
            yield self._expert_factors(by_expert)
        yield self._mixed(0, "missing_slot", "is missing")
        yield self._mixed(2, "duplicated_slot", "counts twice")

    def _with(self, shares: Tensor) -> Tensor:
        return (self.study.rows * (self.weights * shares)[..., None]).sum(1)

    def _constant_slots(self) -> Iterator[Claim | None]:
        """The same slot of every row."""
        if float(self.e.hit.double().mean()) < 0.5 or self.ids.shape[1] == 1:
            return  # the only slot of a row is the row
        for k in range(self.ids.shape[1]):
            for share, kind, text in ((0.0, "missing_slot", "is missing"), (2.0, "duplicated_slot", "counts twice")):
                shares = torch.ones_like(self.weights)
                shares[:, k] = share
                words = f"top-k slot {k} {text} in every row"
                yield self.e.claim(kind, words, self._with(shares), {"slot": k}, self.study.tokens)

    def _by_expert(self) -> dict[int, float] | None:
        """The one share that every expert's readable slots have, or None if some expert's differ."""
        found = {}
        for expert in self.ids.unique().tolist():
            shares = self.shares[self.ids == expert]
            shares = shares[~shares.isnan()]
            if len(shares) and float(shares.max() - shares.min()) > CLOSE:
                return None
            found[int(expert)] = float(shares.mean()) if len(shares) else 1.0
        return found

    def _missing_experts(self, missing: list[int]) -> Iterator[Claim | None]:
        mine = torch.isin(self.e.expected.routing.ids, torch.tensor(missing, dtype=torch.int64)).any(-1)
        if 2 * int(self.e.hit.sum()) < int(mine.sum()):
            return
        hit, total = int((self.e.hit & mine).sum()), int(mine.sum())
        number = f"all its {total}" if hit == total else f"{hit} of its {total}"
        who = f"expert {missing[0]}" if len(missing) == 1 else f"experts {', '.join(map(str, missing))}"
        shares = (~torch.isin(self.ids, torch.tensor(missing))).double()
        text = f"the contribution of {who} is missing in {number} tokens"
        yield self.e.claim("missing_expert", text, self._with(shares), {"experts": missing}, self.study.tokens)

    def _expert_factors(self, by_expert: dict[int, float]) -> Claim | None:
        wrong = {expert: share for expert, share in by_expert.items() if abs(share - 1) > UNEVEN}
        if not wrong or min(map(abs, wrong.values())) < CLOSE:
            return None
        shares = torch.ones_like(self.weights)
        for expert, share in wrong.items():
            shares[self.ids == expert] = share
        told = ", ".join(f"expert {x} is {named(f)} times the expected" for x, f in list(wrong.items())[:4])
        evidence = {"factors": [[x, f] for x, f in wrong.items()][:16], "scope": "expert"}
        claim = self.e.claim("constant_factor", told, self._with(shares), evidence, self.study.tokens)
        alone = all(int((self.ids == expert).sum()) == 1 for expert in wrong)  # a slot's weight may be wrong as well
        return None if claim is None else replace(claim, late=alone or len(wrong) > 1)

    def other_weights(self) -> Claim | None:
        """Slots with any factors of their own: the weights are wrong, whatever the reason."""
        wrong = (self.shares - 1).abs() > UNEVEN
        if not bool(wrong.any()) or not bool((self.shares.abs() > CLOSE).any()):
            return None
        slots = wrong.nonzero().tolist()
        told = [[int(self.study.tokens[t]), k, round(float(self.shares[t, k]), 4) + 0.0] for t, k in slots]
        words = "; ".join(f"{named(f)} times in slot {k} of token {t}" for t, k, f in told[:4])
        text = f"the right experts with other routing weights: {words}"
        prediction = self._with(self.shares.nan_to_num(1.0))
        claim = self.e.claim("wrong_weights", text, prediction, {"slots": told[:16]}, self.study.tokens)
        return None if claim is None else replace(claim, late=True)

    def _mixed(self, share: int, kind: str, text: str) -> Claim | None:
        """Some slot of every hit row, not the same one in all."""
        hit = (self.shares - share).abs() < CLOSE
        if not bool(hit.any(-1).all()) or bool(hit.all()):
            return None
        prediction = self._with(torch.where(hit, float(share), 1.0))
        slots = [[int(t), *h.nonzero().flatten().tolist()] for t, h in zip(self.study.tokens, hit, strict=True)][:16]
        words = f"a top-k slot {text} in {int(self.e.hit.sum())} rows"
        claim = self.e.claim(kind, words, prediction, {"slots": slots}, self.study.tokens)
        return None if claim is None else replace(claim, late=True)
