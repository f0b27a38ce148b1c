"""The audit in a terminal: wrong layer x rule, every rule in one line, and the sentences worth remembering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from harness.faults.audit import GUARD, MOECHECK, RIGHT, YOURS, Audit, Tally
from harness.faults.mde import Effect
from harness.faults.rules import RULES, Rule
from harness.faults.wrong_layers import WRONG_LAYERS

TEXTS = {wrong.name: wrong.text for wrong in WRONG_LAYERS}
SHOWN = (  # one rule of each kind, for the table; the second table has them all
    "flashinfer_fp4",
    "flashinfer_dpsk",
    "flashinfer_fuzz_nvfp4",
    "vllm_nvfp4",
    "vllm_modular",
    "flashinfer_bench_moe",
    "deepgemm_fp8",
    "torch_same",
    "triton_kernels",
)
SCHEMA = 1
WIDTH = 104  # columns of the first table, whatever the terminal: numbers cut to "1…" say nothing


def by_layer(audit: Audit) -> Table:
    """One row per wrong layer: the share of its cases that yours, moecheck and nine rules in use accept."""
    table = _table("% accepted, of the cases in which the wrong layer differs from the right one")
    for heading in ("wrong layer", "cases", YOURS, MOECHECK, *(chr(ord("a") + i) for i in range(len(SHOWN)))):
        table.add_column(heading, justify="left" if heading == "wrong layer" else "right", no_wrap=True)
    for name in audit.layers:
        tallies = [audit.tally(name, judge) for judge in (YOURS, MOECHECK, *SHOWN)]
        table.add_row(TEXTS[name], str(tallies[0].judged), *(_percent(t) for t in tallies))
    right = [audit.tally(RIGHT, judge) for judge in (YOURS, MOECHECK, *SHOWN)]
    table.add_section()
    table.add_row(
        "a right kernel refused", str(audit.cases), *(_percent(Tally(t.judged - t.accepted, t.judged)) for t in right)
    )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def by_effect(effects: Sequence[Effect]) -> Table:
    """One row per recipe and rounding: the relative error that turns the real lane red, in percent."""
    table = _table("Smallest relative error refused in a typical case / in 95 % of the cases, %")
    for heading in ("recipe", "rounded at", "cases", "one expert", "whole output"):
        table.add_column(heading, justify="right" if heading in ("cases", "one expert", "whole output") else "left")
    for effect in effects:
        points = ", ".join(f"{name} {value}" for name, value in asdict(effect.rounding).items() if value is not None)
        sizes = (f"{100 * t.typical:.2g} / {100 * t.most:.2g}" for t in (effect.expert, effect.output))
        table.add_row(effect.recipe, points or "nowhere", str(effect.cases), *sizes)
    return table


def legend() -> str:
    """What the letters of `by_layer` stand for."""
    return "\n".join(f"{chr(ord('a') + i)}  {name}: {RULES[name].source}" for i, name in enumerate(SHOWN))


def by_rule(audit: Audit) -> Table:
    """One row per rule in use: zeros accepted, wrong layers accepted, right kernels refused, cases an impostor passes."""
    table = _table("Every rule in use, on these cases")
    for heading in ("rule", "zeros accepted", "% wrong accepted", "right refused", "untrusted"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for judge in audit.judges:
        zeros, right = audit.tally("zeros", judge), audit.tally(RIGHT, judge)
        refused = f"{right.judged - right.accepted} of {right.judged}"
        guard = f"{len(audit.untrusted(judge))} of {audit.cases}"
        table.add_row(judge, f"{zeros.accepted} of {zeros.judged}", _percent(audit.overall(judge)), refused, guard)
    return table


def sentences(audit: Audit, yours: Rule) -> list[str]:
    """The audit in words, the worst first."""
    zeros, right, overall = audit.tally("zeros", YOURS), audit.tally(RIGHT, YOURS), audit.overall(YOURS)
    said = [f"Your rule ({yours.source}) accepts an all-zero output in {zeros.accepted} of {zeros.judged} cases."]
    worst = audit.worst(YOURS)
    if worst is None:
        said.append(f"It refuses all {overall.judged} wrong outputs.")
    else:
        tally = audit.tally(worst, YOURS)
        often = f"most often: {TEXTS[worst]}, in {tally.accepted} of {tally.judged} cases"
        said.append(f"It accepts {overall.accepted} of {overall.judged} wrong outputs; {often}.")
    blind = len(audit.untrusted(YOURS))
    tried = " or ".join(name for name in GUARD if name in audit.layers)
    if tried:
        said.append(f"Impostors ({tried}) pass in {blind} of {audit.cases} cases: UNTRUSTED, if it decided.")
    said.append(f"It refuses a right kernel in {right.judged - right.accepted} of {right.judged} cases (false alarms).")
    ours, alarms = audit.overall(MOECHECK), audit.tally(RIGHT, MOECHECK)
    said.append(
        f"moecheck's own lanes accept {ours.accepted} of {ours.judged} wrong outputs"
        f" and refuse {alarms.judged - alarms.accepted} of {alarms.judged} right ones."
    )
    return said


def as_json(audit: Audit, yours: Rule, selection: str) -> dict[str, Any]:
    """Everything, for a file: counts [accepted, judged] by layer and judge, and each case that yours lets something through."""
    layers = (RIGHT, *audit.layers)
    return {
        "schema": SCHEMA,
        "selection": selection,
        "rule": yours.source,
        "rules": {rule.name: rule.source for rule in RULES.values()},
        "cases": audit.cases,
        "accepted": {n: {j: _pair(audit.tally(n, j)) for j in audit.judges} for n in layers},
        "untrusted": {j: len(audit.untrusted(j)) for j in audit.judges},
        "let_through": {
            case: [n for n, said in seen.items() if n != RIGHT and said[YOURS]] for case, seen in audit.seen.items()
        },
        "sentences": sentences(audit, yours),
    }


def _pair(tally: Tally) -> list[int]:
    return [tally.accepted, tally.judged]


def _percent(tally: Tally) -> str:
    """In percent, 0 and 100 only where it is none and all; - where nothing was judged."""
    if not tally.judged:
        return "-"
    if tally.accepted in (0, tally.judged):
        return "0" if not tally.accepted else "100"
    return str(min(99, max(1, round(100 * tally.share))))
