"""`moecheck audit`: what would my test have let through? Reference only: no kernel runs, no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from harness import config, plan
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.errors import MoecheckError, SelectionError, UnknownName
from harness.faults.audit import Subject, audit, subject_of
from harness.faults.input_models import INPUT_MODELS, InputModel
from harness.faults.mde import table
from harness.faults.rules import RULES, Rule, close
from harness.faults.wrong_layers import WRONG_LAYERS
from harness.plan import Request
from harness.ratio import assumed_rounding
from harness.report.audit import WIDTH, as_json, by_effect, by_layer, by_rule, legend, sentences
from harness.session import detected_platform
from reference.rounding import Rounding

out = Console(soft_wrap=True, highlight=False, width=max(WIDTH, Console().width))
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(  # noqa: PLR0913 - typer turns parameters into options
    atol: Annotated[float | None, typer.Option(help="Your absolute tolerance.", min=0)] = None,
    rtol: Annotated[float | None, typer.Option(help="Your relative tolerance, of the expected value.", min=0)] = None,
    percent: Annotated[float, typer.Option(help="Share of elements that must match, 0..1.", min=0, max=1)] = 1.0,
    rule: Annotated[str | None, typer.Option(help="A rule in use instead of your own tolerances.")] = None,
    inputs: Annotated[str | None, typer.Option(help="Inputs as another project's test draws them.")] = None,
    draws: Annotated[int, typer.Option(help="How often each row of --inputs is drawn.", min=1)] = 1,
    wrong: Annotated[list[str] | None, typer.Option(help="Wrong layer to try; repeatable; default: all.")] = None,
    platform: Annotated[str | None, typer.Option(help="Platform file; default: this machine's.")] = None,
    tier: Annotated[str | None, typer.Option(help="Tier file; default: smoke.")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", "-b", help="Cases of this backend; repeatable.")] = None,
    case: Annotated[list[str] | None, typer.Option("--case", "-c", help="Case id or pattern; repeatable.")] = None,
    effects: Annotated[bool, typer.Option("--effects", help="Instead: how small an error moecheck itself sees.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """What would this tolerance have let through? Wrong layers of every planned case, judged by your rule, the rules in use
    and moecheck; no kernel runs."""
    if effects:
        if any((atol, rtol, rule, inputs, wrong, json_file)):
            raise MoecheckError("--effects measures moecheck's own lane; it takes a selection of cases and nothing else")
        _effects(_request(platform, tier, backend, case))
        return
    for name in wrong or ():
        _known("wrong layer", name, tuple(layer.name for layer in WRONG_LAYERS))
    model = None if inputs is None else INPUT_MODELS[_known("input model", inputs, INPUT_MODELS)]
    yours = _rule(atol, rtol, percent, rule or (model.rule if model is not None and atol is None and rtol is None else None))
    if model is None:
        request = _request(platform, tier, backend, case)
        planned = _cases(request)
        selection, total, subjects = f"{request.platform}, {request.tier}", len(planned), _subjects(planned)
    elif any((platform, tier, backend, case)):
        raise MoecheckError("--inputs brings its own cases; it takes no --platform, --tier, --backend or --case")
    else:
        selection, total, subjects = model.source, len(model.rows) * draws, model.subjects(draws)
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("cases", total=total)
        result = audit(subjects, yours, wrong or (), lambda done: progress.update(task, completed=done))
    _show(f"{result.cases} cases: {selection}", by_layer(result), legend(), by_rule(result), *sentences(result, yours))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(result, yours, selection), indent=1) + "\n")


def _show(*parts: str | Table) -> None:
    for part in parts:
        out.print(part, markup=False)


def _request(platform: str | None, tier: str | None, backend: list[str] | None, case: list[str] | None) -> Request:
    return Request(platform or detected_platform(), tier or "smoke", tuple(backend or ()), cases=tuple(case or ()))


def _effects(request: Request) -> None:
    """Print what the real lane can see of the planned cases, recipe by recipe."""
    found = table((case, _rounding(case, backend)) for case, backend in _cases(request))
    if not found:
        raise SelectionError("no case of this selection has the real fill and a token: nothing to measure")
    _show(by_effect(found), *(effect.sentence for effect in found))


def _known(kind: str, name: str, known: tuple[str, ...] | dict[str, Rule] | dict[str, InputModel]) -> str:
    if name not in known:
        raise UnknownName(kind, name, known)
    return name


def _rule(atol: float | None, rtol: float | None, percent: float, name: str | None) -> Rule:
    """The rule under audit: a named one, or isclose with both tolerances given."""
    if name is not None and (atol, rtol, percent) == (None, None, 1.0):
        return RULES[_known("rule", name, RULES)]
    if name is not None or atol is None or rtol is None:
        raise MoecheckError("say what to audit: --atol A --rtol R [--percent P], or --rule NAME, not both")
    return Rule("yours", f"atol {atol:g}, rtol {rtol:g}, {100 * percent:g} % of the elements", close(atol, rtol, percent))


def _cases(request: Request) -> list[tuple[Case, Backend]]:
    """The planned cases with a token, each with the first backend planned for it: its rounding points are emulated."""
    backends = discover(())
    device = plan.device_named(config.platform(request.platform))
    first: dict[str, str] = {}
    for item in plan.make(request, backends, device).items:
        first.setdefault(item.case_id, item.subject)
    planned = [(Case.parse(case_id), backends[subject]) for case_id, subject in first.items()]
    return [(case, backend) for case, backend in planned if case.op == "moe" and case.shape.tokens]


def _subjects(planned: list[tuple[Case, Backend]]) -> Iterator[Subject]:
    for case, backend in planned:
        yield subject_of(case, _rounding(case, backend))


def _rounding(case: Case, backend: Backend) -> Rounding:
    return backend.rounding(case) or assumed_rounding(case.recipe)
