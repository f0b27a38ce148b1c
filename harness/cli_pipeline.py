"""moecheck pipeline: what CI systems want of a plan and of a run. docs/ci.md shows each in use."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from harness import config, journal, plan
from harness.backends import files
from harness.errors import PluginError, SelectionError, UnknownName
from harness.report.annotations import errors

MAX_JOBS = 256  # of a matrix, GitHub; Buildkite's parallelism goes further
MAX_SUMMARY = (1 << 20) - 1024  # bytes of a step: GitHub drops the whole summary from 1 MiB on
RESUMABLE = {"automatic": [{"exit_status": 2, "limit": 2}, {"exit_status": -1, "limit": 2}]}  # 2: incomplete; -1: agent lost


class _Plain(yaml.SafeDumper):
    """No anchors: a person reads the steps."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


app = typer.Typer(add_completion=False, help="Matrix, steps and annotations for CI systems.")
out = Console(soft_wrap=True, highlight=False)
Shards = Annotated[int, typer.Option(help="Parts that the plan of each platform is run in.", min=1)]


@app.command()
def matrix(
    runners: Annotated[str, typer.Option(help='JSON: platform -> runner label or labels, e.g. {"sm90": ["gpu", "h100"]}.')],
    shards: Shards = 1,
) -> None:
    """The jobs of a GitHub Actions matrix: one a platform and shard, as one line of JSON."""
    given = _runners(runners)
    jobs = [
        {"platform": platform, "runner": labels, "shard": f"{index}/{shards}", "name": f"{platform}-{index}of{shards}"}
        for platform, labels in given.items()
        for index in range(1, shards + 1)
    ]
    if len(jobs) > MAX_JOBS:
        raise SelectionError(f"{len(given)} platforms x {shards} shards are {len(jobs)} jobs; a matrix has at most {MAX_JOBS}")
    out.print(json.dumps(jobs), markup=False)


def _runners(text: str) -> dict[str, list[str]]:
    try:
        given = json.loads(text)
        labels = {p: [found] if isinstance(found, str) else [str(label) for label in found] for p, found in given.items()}
        if not labels or not all(labels.values()):
            raise ValueError("a platform without a runner")
    except (ValueError, TypeError, AttributeError) as error:
        example = '{"cpu": "ubuntu-latest", "sm90": ["self-hosted", "h100"]}'
        raise SelectionError(
            f"--runners {text:.200}: given no platforms with labels ({error}); wanted e.g. {example}"
        ) from error
    for platform in labels:
        _known("platform", platform, config.names("platforms"))
    return labels


def _known(kind: str, name: str, names: tuple[str, ...] | list[str]) -> None:
    if name not in names:
        raise UnknownName(kind, name, names)


@app.command()
def annotate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or a merge of its shards.")],
    summary: Annotated[
        Path | None, typer.Option(help="Append the run's summary.md to this file.", envvar="GITHUB_STEP_SUMMARY")
    ] = None,
) -> None:
    """Print a run's failures as GitHub annotations, and append its summary to the step's, under GitHub's 1 MiB."""
    the_plan, verdicts = plan.load(folder), journal.read(folder)
    try:
        declared = files(the_plan.request.plugins)
    except PluginError:  # the plugin may live on the machine that ran it
        declared = files()
    for text in errors(verdicts, declared):
        out.print(text, markup=False, soft_wrap=True)
    if summary is not None:
        _append(summary, folder)


def _append(summary: Path, folder: Path) -> None:
    """At most what is left of the step's summary, cut between lines."""
    title = f"## {folder.name}: tier {plan.load(folder).request.tier}\n\n".encode()
    text = (folder / "summary.md").read_bytes() if (folder / "summary.md").exists() else b"no summary\n"
    left = MAX_SUMMARY - (summary.stat().st_size if summary.exists() else 0)
    data = title + text + b"\n"
    if len(data) > left:
        end = b"\n... cut: the rest is in summary.md of the run\n"
        data = data[: max(0, left - len(end))]
        data = data[: data.rfind(b"\n") + 1] + end if left > len(end) else b""
    with summary.open("ab") as file:
        file.write(data)


@app.command()
def buildkite(
    shards: Shards = 4,
    tier: Annotated[str, typer.Option(help="Tier file under configs/tiers.")] = "smoke",
    queue: Annotated[
        list[str] | None, typer.Option(help="PLATFORM=QUEUE: agents of this queue run that platform; repeatable.")
    ] = None,
    install: Annotated[
        str, typer.Option(help="Shell line that makes `moecheck` callable on an agent.")
    ] = "pip install --editable .",
) -> None:
    """Print the steps of a Buildkite pipeline, plan, shards and merge, for `buildkite-agent pipeline upload`."""
    _known("tier", tier, config.names("tiers"))
    queues = dict(_queue(text) for text in queue or ["cpu=default"])
    steps = [step for platform, name in queues.items() for step in _steps(platform, name, tier, shards, install)]
    text = yaml.dump({"steps": steps}, Dumper=_Plain, sort_keys=False, width=1000)
    out.print(text, markup=False, end="")


def _queue(text: str) -> tuple[str, str]:
    platform, _, name = text.partition("=")
    _known("platform", platform, config.names("platforms"))
    if not name:
        raise SelectionError(f"--queue {text}: no queue; wanted PLATFORM=QUEUE, e.g. sm90=h100")
    return platform, name


def _steps(platform: str, queue: str, tier: str, shards: int, install: str) -> list[dict[str, Any]]:
    """Dollars are doubled: the upload would fill them in where the pipeline is made, and the agent must."""
    name = shlex.quote(platform)
    plan_file, folder = f"plans/{name}.json", f"runs/{name}-$$((BUILDKITE_PARALLEL_JOB + 1))of$$BUILDKITE_PARALLEL_JOB_COUNT"
    shard = "$$((BUILDKITE_PARALLEL_JOB + 1))/$$BUILDKITE_PARALLEL_JOB_COUNT"
    agents = {"agents": {"queue": queue}}
    planned: dict[str, Any] = {"label": f"plan {platform}", "key": f"plan-{platform}", **agents}
    planned["commands"] = [install, f"moecheck plan --platform {name} --tier {shlex.quote(tier)} --output {plan_file}"]
    planned["artifact_paths"] = [plan_file]
    run: dict[str, Any] = {"label": f"{platform} %n/%N", "key": f"run-{platform}", "depends_on": f"plan-{platform}"}
    run |= {**agents, "parallelism": shards, "retry": RESUMABLE, "artifact_paths": ["runs/**/*"]}
    run["commands"] = [
        install,
        f"buildkite-agent artifact download {plan_file} .",
        # where a try before died, go on from there
        f'buildkite-agent artifact download --include-retried-jobs "{folder}/*" . || true',
        f'moecheck run --plan {plan_file} --shard "{shard}" --resume "{folder}"',
    ]
    after = {"step": f"run-{platform}", "allow_failure": True}
    merge: dict[str, Any] = {"label": f"merge {platform}", "depends_on": [after], **agents, "artifact_paths": ["merged/**/*"]}
    merge["commands"] = [
        install,
        f'buildkite-agent artifact download "runs/{name}-*/**/*" .',
        f"status=0; moecheck merge runs/{name}-*of* --out merged/{name} || status=$$?",
        "style=error; if [ $$status = 0 ]; then style=success; fi",
        f"buildkite-agent annotate --context {name} --style $$style < merged/{name}/summary.md",
        "exit $$status",
    ]
    return [planned, run, merge]
