"""junit.xml from plan and journal: one testcase per planned case; planned but not run is an error; a pool of cases
beyond its limit (harness/pooled.py) is a failed testcase of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as xml

from harness.known import Outcome, outcome
from harness.pooled import alarms
from harness.report.text import explain
from harness.select import Item
from harness.verdict import Verdict

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 section 2.2, Char
_TAG = {Outcome.RED: "failure", Outcome.GONE: "failure", Outcome.KNOWN: "skipped", Outcome.SKIPPED: "skipped"}


def write(path: Path, planned: Sequence[Item], verdicts: Sequence[Verdict]) -> None:
    """Write the file in one step, so that a reader never sees half of it."""
    by_item = {Item(v.case_id, v.subject): v for v in verdicts}
    suite = xml.Element("testsuite", name="moecheck")
    counts = {"failure": 0, "skipped": 0, "error": 0}
    for item in planned:
        tag = _testcase(suite, item, by_item.get(item))
        if tag is not None:
            counts[tag] += 1
    for pool in alarms(verdicts):
        case = xml.SubElement(suite, "testcase", classname=pool.subject, name=pool.name)
        xml.SubElement(case, "failure", type="WRONG", message=str(pool))
        counts["failure"] += 1
    suite.set("tests", str(len(suite)))
    suite.attrib.update(failures=str(counts["failure"]), skipped=str(counts["skipped"]), errors=str(counts["error"]))
    suite.set("time", f"{sum(v.seconds for v in verdicts):.3f}")
    root = xml.Element("testsuites")
    root.append(suite)
    temporary = path.with_suffix(".tmp")
    xml.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)
    temporary.replace(path)


def _testcase(suite: xml.Element, item: Item, verdict: Verdict | None) -> str | None:
    case = xml.SubElement(suite, "testcase", classname=item.subject, name=item.case_id)
    if verdict is None:
        xml.SubElement(case, "error", type="not-run", message="planned but not run")
        return "error"
    case.set("time", f"{verdict.seconds:.3f}")
    tag = _TAG.get(outcome(verdict))
    if tag is not None:
        message = f"known issue {verdict.known}: {verdict.reason}" if verdict.known else verdict.reason
        detail = xml.SubElement(case, tag, type=str(verdict.status), message=_legal(message))
        detail.text = _legal(explain(verdict))
    return tag


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
