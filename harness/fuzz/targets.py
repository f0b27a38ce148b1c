"""What moecheck reads, each with valid seeds and the way it is read: bundles, journals, plans, four kinds of YAML, case ids,
recorded calls."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from harness import config, journal, plan
from harness.backends import discover
from harness.backends.base import CPU
from harness.bundle import manifest as m
from harness.bundle import read, write
from harness.bundle.collect import collect
from harness.case import Case
from harness.fuzz import dumps
from harness.fuzz.mutate import BYTES, CASE_TOKENS, VALUES, altered, inserted, json_text, spoiled, yaml_text
from harness.journal import Journal
from harness.known import mark, outcome
from harness.report import junit
from harness.report.table import MIN_WIDTH, summary
from harness.report.text import explain, line
from harness.select import Item
from harness.verdict import Comparison, Diagnosis, Finding, Sample, Stage, Status, Verdict

CASE = "moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.{}.s0"
SUBJECT = "torch_grouped_mm"
YAML = {"platforms": config.platform, "tiers": config.tier, "models": config.production}
SPARSE = 1 << 40  # bytes of a file that takes no room


@dataclass(frozen=True)
class Attempt:
    """One malformed input. names: what a refusal must mention; lined: and a line; argv: the same for the command line."""

    target: str
    read: Callable[[], object]
    names: str = ""
    lined: bool = False
    argv: tuple[str, ...] = ()


class Targets:
    """The seeds, made once under `base`; `attempt` spoils one into base/inside. base/outside holds what nobody may touch."""

    def __init__(self, base: Path) -> None:
        self.base, self.folder = base, base / "inside"
        (base / "outside").mkdir()
        (base / "outside" / "secret").write_text("{}")
        self._verdicts = [failure(CASE.format("real")), failure(CASE.format("exact"))]
        self._bundle = _bundle(base / "bundle", self._verdicts[0])
        items = tuple(Item(v.case_id, v.subject) for v in self._verdicts)
        plan.Plan(plan.Request("cpu", "smoke", (SUBJECT,)), 60.0, items, 2).save(base)
        self._plan = (base / plan.NAME).read_bytes()
        lines = [json.dumps(v.to_json()).encode() + b"\n" for v in self._verdicts]
        self._journal = b"".join(lines)
        self._makers = {"bundle": self._spoil_bundle, "journal": self._spoil_journal, "plan": self._spoil_plan}
        self._makers |= {"yaml": self._spoil_yaml, "known_issues": self._spoil_issues, "case": self._spoil_case}
        self._makers |= {"dump": self._spoil_dump}

    @property
    def names(self) -> list[str]:
        """The kinds of input, bundles and YAML twice: they are the most intricate."""
        return [*self._makers, "bundle", "yaml"]

    def attempt(self, name: str, random: Random) -> Attempt:
        """A malformed input of the kind `name` in a fresh folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self._makers[name](random)

    def _spoil_bundle(self, random: Random) -> Attempt:
        folder = self.folder / "b"
        shutil.copytree(self._bundle, folder)
        name = random.choice(sorted(path.name for path in folder.iterdir()))
        path = folder / name
        kind = random.randrange(8)
        if kind == 0:
            _displace(random, path, self.base / "outside" / "secret")
        elif kind == 1:
            path.write_bytes(spoiled(random, path.read_bytes()))
        elif name == m.MANIFEST:
            path.write_bytes(json_text(random, path.read_bytes()))
        else:
            path.write_bytes(_spoiled_file(random, path))
            _sign(folder, name)
        argv = ("load", str(folder))
        return Attempt("bundle", lambda: read.read(folder), str(folder), argv=argv)

    def _spoil_journal(self, random: Random) -> Attempt:
        lines = self._journal.splitlines(keepends=True)
        at = random.randrange(len(lines))
        lines[at] = json_text(random, lines[at][:-1]) + random.choice((b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n"))
        if random.randrange(8) == 0:
            lines.append(random.choice(lines))
        path = self.folder / journal.NAME
        path.write_bytes(b"".join(lines))
        (self.folder / plan.NAME).write_bytes(self._plan)
        return Attempt("journal", self._resume, str(path), True, ("run", "--resume", str(self.folder)))

    def _resume(self) -> None:
        """What --resume and the report of a run do with a journal."""
        verdicts = journal.read(self.folder)
        path = self.folder / journal.NAME
        Journal(self.folder).close()
        if path.read_bytes()[-1:] not in (b"", b"\n"):
            raise AssertionError("half a last line is still there: the next verdict would be glued to it")
        for verdict in verdicts:
            explain(verdict), line(verdict), outcome(verdict)
        summary(verdicts, {}, MIN_WIDTH)
        junit.write(self.folder / "junit.xml", plan.load(self.folder).items, verdicts)

    def _spoil_plan(self, random: Random) -> Attempt:
        data = json_text(random, self._plan)
        if random.randrange(2):  # whoever edits a plan can also compute its digest
            tree = altered(random, json.loads(self._plan))
            if isinstance(tree, dict) and "items" in tree:
                tree["digest"] = plan.digest_of(tree["items"])
            data = json.dumps(tree).encode()
        path = self.folder / plan.NAME
        path.write_bytes(data)
        return Attempt("plan", lambda: plan.load(self.folder).digest, str(path), argv=("run", "--resume", str(self.folder)))

    def _spoil_yaml(self, random: Random) -> Attempt:
        kind = random.choice(sorted(YAML))
        valid = random.choice(sorted((config.ROOT / kind).glob("*.yaml"))).read_bytes()
        path = self.folder / kind / "fuzz.yaml"
        path.parent.mkdir()
        path.write_bytes(yaml_text(random, valid))

        def load() -> None:
            loaded = YAML[kind]("fuzz", self.folder)
            if isinstance(loaded, config.Platform):
                loaded.axes.levels()

        return Attempt(f"yaml {kind}", load, str(path), lined=True)

    def _spoil_issues(self, random: Random) -> Attempt:
        path = self.folder / "known_issues.yaml"
        path.write_bytes(yaml_text(random, (config.ROOT / path.name).read_bytes()))
        read_all = lambda: [mark(v, config.known_issues(self.folder)) for v in self._verdicts]  # noqa: E731
        return Attempt("known_issues", read_all, str(path), lined=True)

    def _spoil_dump(self, random: Random) -> Attempt:
        dumps.spoil(random, self.folder)
        return Attempt("dump", lambda: dumps.judge(self.folder), str(self.folder))

    def _spoil_case(self, random: Random) -> Attempt:
        text = CASE.format(random.choice(("exact", "real")))
        for _ in range(random.choice((1, 1, 2, 3))):
            changed = inserted(random, text, CASE_TOKENS) if random.randrange(3) else None
            text = (
                spoiled(random, text.encode(errors="replace")).decode(errors="surrogateescape") if changed is None else changed
            )
        return Attempt("case", lambda: Case.parse(text).id, argv=("repro", "--platform", "cpu", "--", text))


def failure(case_id: str) -> Verdict:
    """A failure with every part that a verdict can have."""
    sample = Sample(1, 2, 0.5, -0.25, 9.5)
    comparison = Comparison("real", 192, 12, 9.5, 6.0, 3.0, 1.4, 0.2, 1, 2, (3,), (sample, replace(sample, got=float("nan"))))
    finding = Finding("death", "killed by SIGSEGV during launch", {"exit_code": -11, "output": "a\nb"})
    diagnosis = Diagnosis("missing_expert", "expert 3 is missing", 0.99, {"experts": [3]})
    return Verdict(case_id, SUBJECT, Status.WRONG, Stage.DONE, "wrong", (finding,), comparison, diagnosis, {"arch": "cpu"}, 0.5)


def _bundle(folder: Path, verdict: Verdict) -> Path:
    backend = discover()[SUBJECT]
    write.new_folder(folder)
    write.save(folder, write.Judged(verdict, backend, CPU), collect(Case.parse(verdict.case_id), backend, CPU, folder))
    return folder


def _spoiled_file(random: Random, path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json":
        return json_text(random, data)
    if path.suffix == ".safetensors" and random.randrange(2):
        size = int.from_bytes(data[:8], "little")
        header = json_text(random, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return spoiled(random, data)


def _sign(folder: Path, name: str) -> None:
    """Give the manifest the size and hash that the file has now: whoever edits a bundle can do that too."""
    path = folder / m.MANIFEST
    manifest, data = json.loads(path.read_bytes()), (folder / name).read_bytes()
    manifest["files"][name] = asdict(_Signature(len(data), hashlib.sha256(data).hexdigest()))
    path.write_text(json.dumps(manifest))


@dataclass(frozen=True)
class _Signature:
    bytes: int
    sha256: str


def _displace(random: Random, path: Path, secret: Path) -> None:
    """Something else under the name of a file: a link, a pipe, a folder, nothing, too much; or another name in the manifest."""
    kind, data = random.randrange(6), path.read_bytes()
    path.unlink()
    if kind == 0:
        path.symlink_to(secret)
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        with path.open("wb") as file:
            file.truncate(SPARSE)
    elif kind == 4:
        path.write_bytes(random.choice(BYTES) * 10)
    else:
        path.write_bytes(data)
        manifest = path.parent / m.MANIFEST
        tree = json.loads(manifest.read_bytes())
        wanted = random.choice([v for v in VALUES if isinstance(v, str)])
        tree["files"][random.choice((wanted, f"../outside/{secret.name}", str(secret)))] = {"bytes": 2, "sha256": "0" * 64}
        manifest.write_text(json.dumps(tree))
