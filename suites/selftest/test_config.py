"""configs/: what is there loads, and every mistake is answered with file, line, given and wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import config
from harness.errors import ConfigError, UnknownName

PLATFORM = """\
name: toy
arch: cpu
device: cpu
axes:
  tokens: {values: [1, 2], source: "an example"}
  recipe: [bf16]
  routing: [renormalize]
padding_alignment:
  ours: {value: 16, source: "an example"}
"""


OPTIONS = ("bias", "weighting")


@pytest.mark.parametrize("name", config.names("platforms"))
def test_every_platform_loads_and_gives_every_axis(name: str) -> None:
    loaded = config.platform(name)
    assert loaded.name == name
    assert set(loaded.axes.levels()) == set(config.SIZES) | {"recipe", "routing", "activation", "fill", "skew", *OPTIONS}


@pytest.mark.parametrize("name", config.names("tiers"))
def test_every_tier_loads_and_its_models_exist(name: str) -> None:
    tier = config.tier(name)
    assert tier.name == name
    for row in (row for rows in tier.production.values() for row in rows):
        assert config.production(row.model).hidden > 0
    assert set(tier.platforms) | set(tier.production) <= set(config.names("platforms"))


def test_known_issues_name_a_thread_or_a_finding_that_exists() -> None:
    findings = (config.ROOT.parent / "docs" / "findings.md").read_text()
    for issue in config.known_issues():
        assert issue.link.startswith("https://") or f'id="{issue.link.split("#")[1]}"' in findings


@pytest.mark.parametrize(
    ("old", "new", "line", "wanted"),
    [
        ("arch: cpu", "arhc: cpu", 2, "arch"),
        ("values: [1, 2]", "values: [1, two]", 5, "integer"),
        ("values: [1, 2]", "values: [-1]", 5, "greater than or equal to 0"),
        ('source: "an example"}\n  recipe', 'src: "an example"}\n  recipe', 5, "source"),
        ("[renormalize]", "[renormalise]", 7, "renormalize"),
        ("[bf16]", "[bf61]", 6, "bf16"),
        ("value: 16", "value: 0", 9, "greater than or equal to 1"),
        ("device: cpu", "device: [cpu", 4, "YAML"),
    ],
)
def test_a_mistake_is_located(tmp_path: Path, old: str, new: str, line: int, wanted: str) -> None:
    assert old in PLATFORM
    file = tmp_path / "platforms" / "toy.yaml"
    file.parent.mkdir()
    file.write_text(PLATFORM.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        config.platform("toy", tmp_path)
    assert wanted in str(caught.value)
    assert abs(_line(str(caught.value)) - line) <= 1  # a missing key is reported at the mapping that lacks it
    assert str(file) in str(caught.value)


def _line(message: str) -> int:
    return int(message.split(".yaml:")[1].split(":")[0])


def test_an_unknown_platform_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean sm90"):
        config.platform("sm09")


def test_a_misspelt_axis_of_a_known_issue_is_refused(tmp_path: Path) -> None:
    text = (config.ROOT / "known_issues.yaml").read_text()
    (tmp_path / "known_issues.yaml").write_text(text.replace("tokens:", "token:"))
    with pytest.raises(ConfigError, match="tokens"):
        config.known_issues(tmp_path)


def test_a_platform_like_one_that_is_not_there_is_located(tmp_path: Path) -> None:
    """It said which name is unknown, and neither in which file nor where."""
    (tmp_path / "platforms").mkdir()
    text = (config.ROOT / "platforms" / "sm103.yaml").read_text().replace("like: sm100", "like: sm999")
    (tmp_path / "platforms" / "sm103.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.platform("sm103", tmp_path)
    assert f"sm103.yaml:{text[: text.index('like: ')].count(chr(10)) + 1}: given like: sm999" in str(caught.value)
