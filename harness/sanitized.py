"""A nightly's subset under compute-sanitizer: small cases that passed, once more, each tool with a journal of its own.

A kernel that reads beyond its buffer and throws the value away passes every comparison; the tools see the read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console

from harness import config
from harness.case import Case
from harness.journal import Journal, read
from harness.known import mark
from harness.plan import Plan
from harness.report.text import line
from harness.select import Item
from harness.session import device_of
from harness.shard import Shard, size
from harness.verdict import Status, Verdict
from harness.worker import sanitizer
from harness.worker.sanitizer_report import SanitizerError

FOLDER = "sanitizer"
LIMIT_S = 300.0  # of one case: memcheck slows a kernel down 10 to 100 times (Compute Sanitizer manual), the import not


def subset(verdicts: Iterable[Verdict], count: int) -> list[Item]:
    """`count` passed cases of each subject: the smallest with tokens of each recipe, recipes in turn."""
    ranked: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        case = Case.parse(verdict.case_id)
        if verdict.status is Status.PASSED and case.shape.tokens:
            ranked[verdict.subject][str(case.recipe)].append(case)
    chosen = []
    for subject, by_recipe in sorted(ranked.items()):
        cases = [(rank, size(c), c.id) for group in by_recipe.values() for rank, c in enumerate(sorted(group, key=size))]
        chosen += [Item(case_id, subject) for _, _, case_id in sorted(cases)[:count]]
    return chosen


def tools_of(tier: str, shard: Shard | None) -> dict[str, int]:
    """Tool -> cases of each subject that a tier wants under it; of a shard its part, rounded up."""
    tools, parts = config.tier(tier).sanitizer, 1 if shard is None else shard.count
    return {tool: math.ceil(count / parts) for tool, count in tools.items()}


def owed(plan: Plan, shard: Shard | None, verdicts: Iterable[Verdict]) -> dict[str, list[Item]]:
    """Tool -> what is to be judged under it of a run or shard with these verdicts; nothing where no kernel runs on a GPU."""
    if config.platform(plan.request.platform).device != "cuda":
        return {}
    found = list(verdicts)
    return {tool: subset(found, count) for tool, count in tools_of(plan.request.tier, shard).items()}


def sweep(plan: Plan, folder: Path, tools: Mapping[str, int], out: Console) -> list[Verdict]:
    """The verdicts of the subset under each of `tools` (tool -> cases of each subject); what `folder` has already is not run
    again. SanitizerError if a tool is missing or gave no answer for some case: that is no pass."""
    device, found, unanswered = device_of(plan.request.platform), [], []
    if device.kind != "cuda" or not tools:
        return []
    sanitizer.find()
    issues = config.known_issues()
    for tool, count in tools.items():
        place = folder / FOLDER / tool
        place.mkdir(parents=True, exist_ok=True)
        journal = Journal(place)
        for index, item in enumerate(subset(read(folder), count)):
            if item in journal.done:
                continue
            answer = str(place / f"{index}.{item.subject}.json")
            order = sanitizer.Order(item.case_id, item.subject, device, plan.request.plugins, answer)
            try:
                verdict = mark(sanitizer.judge(order, tool, LIMIT_S)[0], issues)
            except SanitizerError as error:
                unanswered.append(f"{item.subject} {item.case_id} under {tool}: {error}")
                continue
            journal.append(verdict)
            out.print(f"{tool}: {line(verdict)}", markup=False)
        journal.close()
        found += read(place)
    if unanswered:
        raise SanitizerError("no answer for " + "\n".join(unanswered))
    return found
