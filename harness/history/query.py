"""Questions to a history, asked in SQL: DuckDB reads the runs' Parquet files, a column where a question wants one.

A verdict counts as passed where its status says so, as failed where it is neither that nor a skip. Runs are ordered by start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
ITEM = "subject, case_id, platform"
GROUP = f"{ITEM}, versions, code"  # what is recorded of the conditions
FREE = "failed AND replay NOT IN ('after', 'open')"  # a failure that is not known to need what ran before


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
                """CREATE TEMP TABLE kept AS SELECT run, started, dated, platform, tier, shard, code, n, failed FROM (
                SELECT run, identity, min(started) started, min(dated) dated, mode(platform) platform, min(tier) tier,
                  min(shard) shard, min(code) code, count(*) n, count(*) FILTER (failed) failed,
                  row_number() OVER (PARTITION BY identity ORDER BY count(*) DESC, run) AS place
                FROM every WHERE started >= ? GROUP BY run, identity) WHERE place = 1""",
                [since],
            )
            self._connection.execute(f"CREATE TEMP VIEW verdicts AS SELECT {names} FROM every SEMI JOIN kept USING (run)")
            self._connection.execute(
                f"""CREATE TEMP TABLE flaky AS SELECT {GROUP}, count(*) FILTER (status = 'PASSED') AS good,
                  count(*) FILTER ({FREE}) AS bad, count(*) FILTER (replay = 'vanished') AS vanished,
                  coalesce(max(started) FILTER (status = 'PASSED') < min(started) FILTER ({FREE}), false)
                    AND count(*) FILTER ({FREE} AND replay <> 'alone') = 0 AS stayed
                FROM verdicts WHERE outcome <> 'skipped' GROUP BY {GROUP}
                HAVING vanished > 0 OR (good > 0 AND bad > 0 AND NOT stayed AND code <> '' AND NOT ends_with(code, '+'))"""
            )

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
        found = self._all(
            f"""WITH newest AS (
              SELECT {ITEM}, arg_max(outcome, (started, run)) AS now, max((started, run)) FILTER (status = 'PASSED') AS good,
                arg_max(versions, (started, run)) AS versions, arg_max(code, (started, run)) AS code
              FROM verdicts WHERE outcome <> 'skipped' GROUP BY {ITEM}),
            lost AS (SELECT {ITEM}, good FROM newest n WHERE now = 'red' AND good IS NOT NULL AND NOT EXISTS (
              SELECT * FROM flaky f WHERE ({GROUP}) = ({_of("n", GROUP)}))),
            told AS (SELECT {ITEM}, run, started, status, reason, replay, versions, code,
                (started, run) = good AS passed, (started, run) > good AND failed AS bad
              FROM verdicts JOIN lost USING ({ITEM}) WHERE outcome <> 'skipped' AND (started, run) >= good)
            SELECT {ITEM}, any_value(run) FILTER (passed), any_value(started) FILTER (passed),
              arg_min(run, (started, run)) FILTER (bad), min(started) FILTER (bad), count(*) FILTER (bad),
              arg_max(status, (started, run)), arg_max(reason, (started, run)), arg_max(replay, (started, run)),
              any_value(versions) FILTER (passed), any_value(code) FILTER (passed),
              arg_min(versions, (started, run)) FILTER (bad), arg_min(code, (started, run)) FILTER (bad)
            FROM told GROUP BY {ITEM} ORDER BY {ITEM}"""
        )
        return [Regression(*(*v[:11], _environment(v[11], v[12]), _environment(v[13], v[14]))) for v in found]

    def flakes(self) -> list[Flake]:
        """What counts: in runs on the same device with the same versions of everything, moecheck's commit included and without
        uncommitted changes, the case both passed and failed; a failure that needs what ran before does not count, and one
        that came to stay and dies alone in a fresh child is no flake. Or a death that fresh children did not repeat."""
        found = self._all(
            f"""WITH items AS (SELECT DISTINCT {ITEM} FROM flaky),
            judged AS (SELECT {GROUP}, started, run, status, replay, status = 'PASSED' AS passed, {FREE} AS free
              FROM verdicts JOIN items USING ({ITEM}) WHERE outcome <> 'skipped'),
            sets AS (SELECT {GROUP}, count(*) FILTER (free) AS bad, count(*) FILTER (passed) AS good,
                max((started, run)) FILTER (free) AS last FROM judged GROUP BY {GROUP}),
            rates AS (SELECT {ITEM}, sum(s.bad)::INT AS bad, sum(s.good + s.bad)::INT AS runs FROM sets s
              LEFT JOIN flaky f USING ({GROUP}) WHERE s.good > 0 OR f.vanished > 0 GROUP BY {ITEM}),
            newest AS (SELECT {ITEM}, max(s.last) AS last, arg_max(versions, s.last) AS versions, arg_max(code, s.last) AS code,
                sum(f.vanished)::INT AS vanished FROM sets s JOIN flaky f USING ({GROUP}) GROUP BY {ITEM})
            SELECT {ITEM}, r.bad, r.runs, n.vanished,
              string_agg(CASE WHEN passed THEN '.' ELSE 'F' END, '' ORDER BY started, run), n.last[1],
              arg_max(status, (started, run)) FILTER (free), n.versions, n.code
            FROM judged j JOIN rates r USING ({ITEM}) JOIN newest n USING ({ITEM})
            GROUP BY {ITEM}, r.bad, r.runs, n.vanished, n.last, n.versions, n.code ORDER BY {ITEM}"""
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


def _of(table: str, columns: str) -> str:
    return ", ".join(f"{table}.{name}" for name in columns.split(", "))


def _literal(path: str) -> str:
    """A path whose letters DuckDB does not take for a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _environment(text: str, code: str = "") -> dict[str, str]:
    environment: dict[str, str] = json.loads(text) if text else {}
    return {**environment, "moecheck": code} if code else environment
