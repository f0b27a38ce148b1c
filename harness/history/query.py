"""Questions to a history, asked in SQL: DuckDB reads the runs' Parquet files, a column where a question wants one.

A verdict counts as passed where its status says so, as failed where it is neither that nor a skip. Runs are ordered by start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.errors import HistoryError, MoecheckError
from harness.history import store
from harness.history.answers import Drift, Flake, Matched, Regression, Seen, Slow, drift_of
from harness.history.ledger import Fact
from harness.history.rows import COLUMNS, SCHEMA
from harness.history.store import Place
from harness.reading import printable

PATTERN = 60  # outcomes shown of a flake
ITEM = "hash(v.subject, v.case_id, v.platform)"  # 64 bits: two of a million items meet once in 40 million histories


class History:
    """The runs under a folder or URL, begun at `since` or later. left_out: run folders that could not be read, and why. Use
    as a context manager."""

    def __init__(self, url: str, cache: Path, since: str = "") -> None:
        duckdb = store.duckdb()
        place = Place(url)
        self.left_out: list[str] = []
        files = []
        for entry in place.entries():
            try:
                files.append(
                    place.address(entry.name, store.NAME) if entry.compact else str(store.compacted(place, entry, cache))
                )
            except MoecheckError as error:
                self.left_out.append(str(error))
        if not files:
            text = f"; left out: {'; '.join(self.left_out)}" if self.left_out else ""
            raise HistoryError(
                f"{url}: no run in it{text}; give a folder of run folders, or moecheck history add RUN --to {url}"
            )
        self._error = duckdb.Error
        self._connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        if not place.local:
            self._connection.register_filesystem(place.fs)
        self._judged = False
        self._open(files, since)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def _open(self, files: list[str], since: str) -> None:
        """The view `verdicts`: of two copies of a run the longer one."""
        names = ", ".join(COLUMNS)
        with self._said():
            self._connection.read_parquet([_literal(file) for file in files], hive_partitioning=False).create_view("every")
            schemas = self._all("SELECT DISTINCT schema FROM every")
            if schemas != [(SCHEMA,)] and schemas:
                raise HistoryError(f"rows of schema {', '.join(str(s[0]) for s in schemas)}; this moecheck reads {SCHEMA}")
            self._connection.execute(
                """CREATE TEMP TABLE kept AS SELECT row_number() OVER (ORDER BY started, run) AS seq, run, started, dated,
                  platform, tier, shard, code, n, failed FROM (
                SELECT run, identity, min(started) started, min(dated) dated, mode(platform) platform, min(tier) tier,
                  min(shard) shard, min(code) code, count(*) n, count(*) FILTER (failed) failed,
                  row_number() OVER (PARTITION BY identity ORDER BY count(*) DESC, run) AS place
                FROM every WHERE started >= ? GROUP BY run, identity) WHERE place = 1""",
                [since],
            )
            for run, started in self._all("SELECT run, started FROM kept"):
                _moment(run, started)
            self._connection.execute(f"CREATE TEMP VIEW verdicts AS SELECT {names} FROM every SEMI JOIN kept USING (run)")

    def _judge(self) -> None:
        """The tables `judged`, what was no skip, by numbers: seq of the run, item, cond for all that is recorded of the
        conditions; and `flaky`, of each item the conditions under which it has both outcomes, as `flakes` has it."""
        if self._judged:
            return
        with self._said():
            self._connection.execute(
                f"""CREATE TEMP TABLE judged AS SELECT seq, {ITEM} AS item, hash(versions, v.code) AS cond,
                  v.code <> '' AND NOT ends_with(v.code, '+') AS exact, status = 'PASSED' AS passed, v.failed,
                  v.failed AND replay NOT IN ('after', 'open') AS free, replay, outcome = 'red' AS red
                FROM every v JOIN kept k USING (run) WHERE outcome <> 'skipped'"""
            )
            self._connection.execute(
                """CREATE TEMP TABLE flaky AS SELECT item, cond, count(*) FILTER (replay = 'vanished') AS vanished,
                  max(seq) FILTER (free) AS last FROM judged GROUP BY item, cond
                HAVING vanished > 0 OR (bool_or(passed) AND bool_or(free) AND bool_and(exact) AND NOT (
                  max(seq) FILTER (passed) < min(seq) FILTER (free) AND count(*) FILTER (free AND replay <> 'alone') = 0))"""
            )
        self._judged = True

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise HistoryError(f"history: a file is no Parquet of moecheck's: {printable(str(error))[:500]}") from error

    def _all(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._said():
            found: list[tuple[Any, ...]] = self._connection.execute(sql, list(values)).fetchall()
        return found

    def runs(self) -> list[Seen]:
        """Oldest first."""
        columns = "run, started, dated, platform, tier, shard, code, n, failed"
        return [Seen(*values) for values in self._all(f"SELECT {columns} FROM kept ORDER BY started, run")]

    def regressions(self) -> list[Regression]:
        """Cases whose newest verdict fails and is excused by no known issue, and that passed before; not those that are
        flaky at the newest verdict's versions."""
        self._judge()
        found = self._all(
            f"""WITH newest AS (SELECT item, arg_max(red, seq) AS red, arg_max(cond, seq) AS cond,
                max(seq) FILTER (passed) AS good FROM judged GROUP BY item),
            lost AS (SELECT item, good FROM newest n WHERE red AND good IS NOT NULL
              AND NOT EXISTS (SELECT * FROM flaky f WHERE f.item = n.item AND f.cond = n.cond)),
            span AS (SELECT item, good, min(seq) AS bad, max(seq) AS last, count(*) AS runs
              FROM judged JOIN lost USING (item) WHERE failed AND seq > good GROUP BY item, good),
            three AS (SELECT item, unnest([good, bad, last]) AS seq, good, bad, last, runs FROM span),
            told AS (SELECT DISTINCT v.*, k.seq, good, bad, last, runs FROM every v JOIN kept k USING (run)
              JOIN three t ON t.seq = k.seq AND t.item = {ITEM})
            SELECT subject, case_id, platform, any_value(run) FILTER (seq = good), any_value(started) FILTER (seq = good),
              any_value(run) FILTER (seq = bad), any_value(started) FILTER (seq = bad), runs,
              any_value(status) FILTER (seq = last), any_value(reason) FILTER (seq = last),
              any_value(replay) FILTER (seq = last),
              any_value(versions) FILTER (seq = good), any_value(code) FILTER (seq = good),
              any_value(versions) FILTER (seq = bad), any_value(code) FILTER (seq = bad)
            FROM told GROUP BY subject, case_id, platform, runs ORDER BY ALL"""
        )
        return [Regression(*(*v[:11], _environment(v[11], v[12]), _environment(v[13], v[14]))) for v in found]

    def flakes(self) -> list[Flake]:
        """What counts: in runs on the same device with the same versions of everything, moecheck's commit included and without
        uncommitted changes, the case both passed and failed; a failure that needs what ran before does not count, and one
        that came to stay and dies alone in a fresh child is no flake. Or a death that fresh children did not repeat."""
        self._judge()
        found = self._all(
            f"""WITH items AS (SELECT item, sum(vanished)::INT AS vanished, max(last) AS last FROM flaky GROUP BY item),
            sets AS (SELECT item, cond, count(*) FILTER (free) AS bad, count(*) FILTER (passed) AS good
              FROM judged SEMI JOIN items USING (item) GROUP BY item, cond),
            rates AS (SELECT item, sum(bad)::INT AS bad, sum(good + bad)::INT AS runs FROM sets s
              LEFT JOIN flaky f USING (item, cond) WHERE good > 0 OR f.vanished > 0 GROUP BY item),
            patterns AS (SELECT item, string_agg(CASE WHEN passed THEN '.' ELSE 'F' END, '' ORDER BY seq) AS pattern
              FROM judged SEMI JOIN items USING (item) GROUP BY item)
            SELECT subject, case_id, v.platform, bad, runs, vanished, pattern, v.started, status, versions, v.code
            FROM every v JOIN kept k USING (run) JOIN items i ON i.last = k.seq AND i.item = {ITEM}
              JOIN rates r ON r.item = i.item JOIN patterns p ON p.item = i.item ORDER BY ALL"""
        )
        return [Flake(*(*v[:6], v[6][-PATTERN:], *v[7:9], _environment(v[9]), v[10])) for v in found]

    def slowest(self, count: int) -> list[Slow]:
        """By the median of their seconds."""
        found = self._all(
            """SELECT subject, case_id, arch, median(seconds) AS middle, max(seconds), count(*) FROM verdicts WHERE ran
            GROUP BY subject, case_id, arch ORDER BY middle DESC, subject, case_id, arch LIMIT ?""",
            count,
        )
        return [Slow(*values) for values in found]

    def drift(self) -> list[Drift]:
        """Of each subject, recipe and arch: every release of the library against the one before. Runs of one release repeat
        the same errors, so a case counts once a release, with its mean."""
        found = self._all(
            """WITH cases AS (SELECT subject, recipe, arch, library, case_id, min(started) AS started, avg(rel_l2) AS rel_l2,
                avg(mean_z2) FILTER (lane = 'real') AS z2, min(independent) FILTER (lane = 'real') AS errors
              FROM verdicts WHERE status = 'PASSED' AND lane IN ('real', 'ratio') AND rel_l2 > 0 GROUP BY ALL),
            releases AS (SELECT subject, recipe, arch, library, lag(library) OVER (
                PARTITION BY subject, recipe, arch ORDER BY min(started), library) AS before
              FROM cases GROUP BY subject, recipe, arch, library)
            SELECT r.subject, r.recipe, r.arch, r.before, r.library, count(*), sum(least(a.errors, b.errors)),
              sum(a.z2 * least(a.errors, b.errors)), sum(b.z2 * least(a.errors, b.errors)),
              sum(ln(b.rel_l2 / a.rel_l2)), sum(ln(b.rel_l2 / a.rel_l2) ** 2)
            FROM releases r JOIN cases a ON (a.subject, a.recipe, a.arch, a.library) = (r.subject, r.recipe, r.arch, r.before)
              JOIN cases b ON (b.subject, b.recipe, b.arch, b.library) = (r.subject, r.recipe, r.arch, r.library)
                AND b.case_id = a.case_id
            GROUP BY ALL ORDER BY ALL"""
        )
        return [drift_of(values, len(found)) for values in found]

    def facts(self) -> list[Fact]:
        """What the verdicts say of each cell, for the ledger."""
        found = self._all(
            """WITH cell AS (SELECT subject, recipe, activation_format, arch, coalesce(max(started) FILTER (ran), '') AS last,
                max(started) AS asked, arg_max(run, (started, run)) FILTER (ran) AS run FROM verdicts GROUP BY ALL),
            after AS (SELECT subject, recipe, activation_format, arch, status || ': ' || reason AS why, count(*) AS n
              FROM verdicts v JOIN cell c USING (subject, recipe, activation_format, arch)
              WHERE NOT ran AND v.started > c.last GROUP BY ALL),
            why AS (SELECT subject, recipe, activation_format, arch, arg_max(why, (n, why)) AS why, max(n) AS n
              FROM after GROUP BY ALL),
            ended AS (SELECT c.run, min(r.started) AS stopped FROM (SELECT DISTINCT run FROM cell) c JOIN kept k USING (run)
              JOIN kept r ON (r.platform, r.tier, r.shard) = (k.platform, k.tier, k.shard)
                AND r.started > k.started AND 2 * r.n >= k.n GROUP BY c.run),
            done AS (SELECT subject, recipe, activation_format, arch, v.run, any_value(device) AS device,
                mode(library) AS library, count(*) AS n, count(*) FILTER (failed) AS failed
              FROM verdicts v JOIN cell c USING (subject, recipe, activation_format, arch)
              WHERE ran AND v.run = c.run GROUP BY ALL)
            SELECT subject, recipe, activation_format, arch, c.last, coalesce(device, ''), coalesce(library, ''),
              coalesce(c.run, ''), coalesce(d.n, 0), coalesce(failed, 0), asked, coalesce(stopped, ''), coalesce(why, ''),
              coalesce(w.n, 0)
            FROM cell c LEFT JOIN done d USING (subject, recipe, activation_format, arch)
              LEFT JOIN why w USING (subject, recipe, activation_format, arch)
              LEFT JOIN ended e ON e.run = c.run ORDER BY ALL"""
        )
        return [Fact(*values) for values in found]

    def executed(self, since: str) -> dict[tuple[str, str], list[str]]:
        """(platform, subject) -> ids of the cases that really ran in runs begun at `since` or later."""
        found: dict[tuple[str, str], list[str]] = {}
        wanted = "SELECT DISTINCT platform, subject, case_id FROM verdicts WHERE ran AND started >= ? ORDER BY ALL"
        for platform, subject, case_id in self._all(wanted, since):
            found.setdefault((platform, subject), []).append(case_id)
        return found

    def known(self) -> dict[str, Matched]:
        """Known issue -> what the runs say of it."""
        found = self._all(
            """WITH marked AS (SELECT known, run, started, outcome FROM verdicts WHERE known <> ''),
            newest AS (SELECT known, max((started, run)) FILTER (outcome = 'known') AS matched,
                max((started, run)) FILTER (outcome IN ('known', 'gone')) AS judged,
                arg_max(run, started) FILTER (outcome = 'skipped') AS held FROM marked GROUP BY known)
            SELECT known, coalesce(matched[2], ''), coalesce(matched[1], ''),
              count(*) FILTER (outcome = 'known' AND (started, run) = matched), coalesce(judged[2], ''),
              count(*) FILTER (outcome = 'gone' AND (started, run) = judged), coalesce(held, '')
            FROM marked JOIN newest USING (known) GROUP BY known, matched, judged, held"""
        )
        return {values[0]: Matched(*values[1:]) for values in found}


def _literal(path: str) -> str:
    """A path whose letters DuckDB does not take for a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _moment(run: str, started: str) -> None:
    """HistoryError for a start that is no time: somebody else may have written the file."""
    try:
        aware = datetime.fromisoformat(started).tzinfo is not None
    except (ValueError, TypeError):
        aware = False
    if not aware:
        text = printable(f"run {run}: started at {started}")[:300]
        raise HistoryError(f"{text}; wanted ISO 8601 with its zone; delete its {store.NAME}, the journal is enough")


def _environment(text: str, code: str = "") -> dict[str, str]:
    """The recorded versions; what is no JSON object, which nobody here wrote, as it stands."""
    try:
        loaded = json.loads(text or "{}")
        environment = {str(name): str(value) for name, value in loaded.items()}
    except (ValueError, AttributeError):
        environment = {"versions": text}
    return {**environment, "moecheck": code} if code else environment
