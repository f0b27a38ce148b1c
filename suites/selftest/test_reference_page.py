"""docs/reference.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from harness.report.reference_page import WITNESSES, page
from reference.formats import all_formats
from reference.layouts import all_layouts
from reference.recipes import RECIPES
from reference.routing import RULES

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_page_is_the_generated_one() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == page()


def test_every_format_layout_rule_and_recipe_is_on_the_page() -> None:
    text = page()
    assert all(f"| `{name}` |" in text for names in (all_formats(), all_layouts(), RULES, RECIPES) for name in names)


def test_every_witness_file_exists() -> None:
    for text in WITNESSES.values():
        for name in (word.strip("(),") for word in text.split() if word.startswith("test_")):
            assert list((ROOT / "suites" / "selftest").glob(name)), name
