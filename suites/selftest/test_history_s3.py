"""A history in a bucket, over the real protocol: s3fs against moto's server on this machine (.ci/witnesses installs them)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import journal, run_info
from harness.errors import HistoryError
from harness.history import synthetic
from harness.history.query import History
from harness.history.store import Place, add
from harness.history.synthetic import Night

NEEDS = "s3fs and moto's server are not here: make witnesses"
server = pytest.importorskip("moto.server", reason=NEEDS)
s3fs = pytest.importorskip("s3fs", reason=NEEDS)

RELEASES = {"torch": "2.13.0", "onnxruntime": "1.32.0", "triton": "3.7.1"}
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
NIGHTS = [Night(number, RELEASES, f"{number:040}") for number in range(3)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """One that is there and empty."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_CONFIG_FILE": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    name = f"nightly-{random.randrange(1 << 30)}"
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name)
    yield name
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    plan = synthetic.items(12)
    return [synthetic.write(tmp_path / f"{n.number}", n, synthetic.verdicts(n, plan)) for n in NIGHTS]


def test_runs_are_added_once_and_answer(bucket: str, runs: list[Path], tmp_path: Path) -> None:
    place = Place(f"s3://{bucket}/a/b")
    first = add(runs[0], place)
    assert first.new
    assert add(runs[0], Place(place.url)) == replace(first, new=False)
    assert all(add(run, place).new for run in runs[1:])
    with History(f"{place.url}/", tmp_path / "cache") as history:
        assert [(run.run[-25:], run.verdicts) for run in history.runs()] == [(e.name[-25:], 12) for e in place.entries()]
        assert history.left_out == history.regressions() == []


def test_plain_run_folders_are_read(bucket: str, runs: list[Path], tmp_path: Path) -> None:
    """Somebody's `aws s3 cp`, to the bucket's root: no Parquet file, and one journal without run.json."""
    place = Place(f"s3://{bucket}")
    place.write(runs[0] / run_info.NAME, "x", run_info.NAME)
    for name, run in (("x", runs[0]), ("y", runs[1])):
        place.write(run / journal.NAME, name, journal.NAME)
    with History(place.url, tmp_path / "cache") as history:
        assert {(run.run, run.dated) for run in history.runs()} == {("x", "run.json"), ("y", "mtime")}


Asked = Callable[[str, Path, Path], object]


def ask(url: str, run: Path, cache: Path) -> object:
    return History(url, cache)


def put(url: str, run: Path, cache: Path) -> object:
    return add(run, Place(url))


@pytest.mark.parametrize("call", [ask, put])
def test_no_such_bucket_is_a_sentence_and_makes_none(call: Asked, bucket: str, runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"s3://not-there/x: there is no bucket not-there.*credentials"):
        call("s3://not-there/x", runs[0], tmp_path / "cache")
    assert "not-there" not in s3fs.S3FileSystem().ls("", refresh=True)


@pytest.mark.parametrize("call", [ask, put])
def test_no_credentials_is_a_sentence(
    call: Asked, bucket: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(HistoryError, match=rf"s3://{bucket}/x: .*[Cc]redentials"):
        call(f"s3://{bucket}/x", runs[0], tmp_path / "cache")


@pytest.mark.parametrize("call", [ask, put])
def test_a_server_that_is_not_there_is_a_sentence(
    call: Asked, bucket: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(HistoryError, match=rf"s3://{bucket}/x: .*127\.0\.0\.1:9"):
        call(f"s3://{bucket}/x", runs[0], tmp_path / "cache")


def test_an_empty_prefix_has_no_run(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="no run in it"):
        History(f"s3://{bucket}/x", tmp_path / "cache")
