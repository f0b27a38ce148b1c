"""Where things lie and what they are called, for those that must not wait for torch."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUP = "moecheck.backends"  # of entry points: distributions that bring backends
JOURNAL = "journal.jsonl"  # of a run folder


def names(kind: str, root: Path = CONFIGS) -> list[str]:
    """The platforms, tiers or models there are."""
    return sorted(path.stem for path in (root / kind).glob("*.yaml"))


def plans() -> Path | None:
    """Where this user's plans are kept; None where nobody can say."""
    try:
        from platformdirs import user_cache_path

        return user_cache_path("moecheck") / "plans"
    except (ImportError, RuntimeError):  # not installed on a GPU machine; no home
        return None


def put(path: Path, text: str) -> None:
    """Whole or not there: a kill must not leave half a file."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
