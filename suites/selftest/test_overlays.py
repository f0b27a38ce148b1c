"""Overlays of other releases, from tiny wheels: what they hold, what they refuse and in which words, what they leave alone."""

from __future__ import annotations

import base64
import hashlib
import os
import resource
import stat
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.select import Item
from harness.versions import base, env, wheelhouse
from harness.versions.axes import releases
from harness.versions.env import Overlay, Source, make, resolve
from harness.versions.judging import environment, importable

TOY = "moecheck-toy"


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str] | None = None, needs: tuple[str, ...] = ()) -> Path:
    """A pure wheel of one module that knows its version."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    members = dict(files or {f"{module}/__init__.py": f"VERSION = {version!r}\n"})
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    members[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digests = {
        n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=").decode() for n, t in members.items()
    }
    lines = [f"{n},sha256={digests[n]},{len(t.encode())}\n" for n, t in members.items()]
    members[f"{info}/RECORD"] = "".join(lines) + f"{info}/RECORD,,\n"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse in which most releases of the toy have something wrong."""
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "1.1", "2.0rc1"):
        wheel(folder, TOY, version)
    wheel(folder, TOY, "3.0", needs=("torch<2", "moecheck-dep"))
    wheel(folder, TOY, "3.1", needs=("triton<2",) if "triton" in base.installed() else ("torch<1",))
    wheel(folder, TOY, "4.0", needs=("moecheck-absent>=7",))
    wheel(folder, TOY, "5.0", needs=("moecheck-dep==1.0b2", "packaging"))
    cut = wheel(folder, TOY, "6.0")
    cut.write_bytes(cut.read_bytes()[:200])
    flipped = wheel(folder, TOY, "6.1")
    flipped.write_bytes(flipped.read_bytes().replace(b"VERSION", b"version"))
    wheel(folder, TOY, "7.0", {"moecheck_toy/__init__.py": "raise ImportError('libnothing.so is missing')\n"})
    wheel(folder, TOY, "8.0", {"moecheck_toy/__init__.py": "x" * 300_000})
    wheel(folder, "moecheck-dep", "1.0b2")
    wheel(folder, "moecheck-dep", "0.9")
    wheel(folder, "torch", "1.0")
    return folder


def said(overlay: Overlay, code: str) -> str:
    """What a child over the overlay prints."""
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment(overlay), capture_output=True, text=True, check=True).stdout.strip()


def test_an_overlay_holds_only_what_differs_and_touches_nothing_else(cache: Path, wheels: Path) -> None:
    places = [Path(sysconfig.get_path("purelib")), Path(sys.prefix)]
    before = [sorted(os.listdir(p)) for p in places]
    overlay = make({TOY: "5.0"}, Source(wheelhouse=wheels), cache)
    assert overlay.packages == {TOY: "5.0", "moecheck-dep": "1.0b2"}  # packaging is here; a pre-release that is asked for
    assert said(overlay, "import moecheck_toy; print(moecheck_toy.VERSION)") == "5.0"
    module = overlay.path / "moecheck_toy" / "__init__.py"
    assert os.stat(module).st_nlink > 1, "a copy, not a link into uv's cache"
    made = (overlay.path / env.MANIFEST).stat()
    again = make({"Moecheck.Toy": "5.0"}, Source(wheelhouse=wheels), cache)
    assert again == overlay
    assert (overlay.path / env.MANIFEST).stat() == made
    assert [sorted(os.listdir(p)) for p in places] == before


def test_the_overlay_wins_over_what_is_installed(cache: Path, tmp_path: Path) -> None:
    here = metadata.version("iniconfig")
    wheel(tmp_path, "iniconfig", "99.0")
    overlay = make({"iniconfig": "99.0"}, Source(wheelhouse=tmp_path), cache)
    code = "import iniconfig, importlib.metadata as m; print(iniconfig.VERSION, m.version('iniconfig'), m.version('pytest'))"
    assert said(overlay, code) == f"99.0 99.0 {metadata.version('pytest')}"
    assert metadata.version("iniconfig") == here


def test_what_is_installed_needs_no_wheel(cache: Path) -> None:
    """Only from a wheelhouse is it made in any case: the folder's wheel is what is asked for."""
    assert make({"iniconfig": metadata.version("iniconfig")}, Source("http://127.0.0.1:9/simple"), cache).packages == {}


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("9.9", r"moecheck-toy==9\.9: it does not resolve: .*no version of moecheck-toy==9\.9"),
        ("4.0", r"it does not resolve: .*moecheck-absent was not found"),
        ("3.0", r"moecheck-toy==3\.0: it would replace torch \S+ -> 1\.0, a downgrade; --allow torch"),
        ("3.1", r"it does not go with t\w+ \S+, and the wheels of another are not to be had"),
        ("6.0", r"moecheck-toy==6\.0: its wheel is corrupt"),
        ("6.1", r"moecheck-toy==6\.1: its wheel is corrupt: .*Bad CRC"),
        ("7.0", r"moecheck-toy==7\.0 does not import here: ImportError: libnothing\.so is missing"),
    ],
)
def test_a_release_that_cannot_be_told_says_why(cache: Path, wheels: Path, version: str, text: str) -> None:
    with pytest.raises(CannotTell, match=text) as caught:
        importable(make({TOY: version}, Source(wheelhouse=wheels), cache))
    assert "\n" not in caught.value.reason
    assert not list((cache / "overlays").glob(".*"))


def test_torch_moves_only_where_it_is_allowed(cache: Path, wheels: Path) -> None:
    overlay = make({TOY: "3.0"}, Source(wheelhouse=wheels, allow=("torch",)), cache)
    assert overlay.packages == {TOY: "3.0", "torch": "1.0", "moecheck-dep": "0.9"}
    moved = resolve({TOY: "3.0"}, Source(wheelhouse=wheels), cache)
    assert moved.moved["torch"] == (metadata.version("torch"), "1.0")
    assert moved.downgrades == ("torch",)


def test_an_entry_point_that_is_not_there(cache: Path, wheels: Path) -> None:
    overlay = make({TOY: "1.0"}, Source(wheelhouse=wheels), cache)
    importable(overlay, ("moecheck_toy.VERSION", "elsewhere.function"))
    with pytest.raises(CannotTell, match=r"moecheck-toy==1\.0: it has no moecheck_toy\.sub\.layer"):
        importable(overlay, ("moecheck_toy.sub.layer",))


def test_an_overlay_over_which_moecheck_does_not_run(cache: Path, tmp_path: Path) -> None:
    wheel(tmp_path, "packaging", "99.0", {"packaging/__init__.py": "raise ImportError('another world')\n"})
    wheel(tmp_path, TOY, "1.0", needs=("packaging==99.0",))
    overlay = make({TOY: "1.0"}, Source(wheelhouse=tmp_path), cache)
    with pytest.raises(CannotTell, match=r"does not run over .*packaging==99\.0: exit status 1: ImportError: another world"):
        env.judge(overlay, Item("moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0", "torch_grouped_mm"), "cpu")


def test_the_three_wheels_of_flashinfer_move_together(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")
    have = {name: base.Installed("0.1", ("moecheck-unmet",)) for name in names}
    monkeypatch.setattr(base, "installed", lambda: have)
    wheel(tmp_path, names[0], "0.2", needs=("moecheck-unmet>=3",))
    wheel(tmp_path, names[1], "0.2")
    with pytest.raises(CannotTell, match="flashinfer-jit-cache"):
        make({names[0]: "0.2"}, Source(wheelhouse=tmp_path), cache)
    wheel(tmp_path, names[2], "0.2+cu130")
    overlay = make({names[0]: "0.2"}, Source(wheelhouse=tmp_path), cache)
    assert overlay.packages == {names[0]: "0.2", names[1]: "0.2", names[2]: "0.2+cu130"}  # and what the base lives without
    del have[names[2]]
    assert len(make({names[0]: "0.2"}, Source(wheelhouse=tmp_path), cache).packages) == 2


def test_folders_of_pth_files_come_along(cache: Path, tmp_path: Path) -> None:
    """As of nvidia-cutlass-dsl, whose .pth runs code."""
    code = "import os, sys, moecheck_pth; sys.path.insert(0, os.path.join(moecheck_pth.__path__[0], 'inner'))\n"
    files = {"moecheck_pth/__init__.py": "", "moecheck_pth/inner/deep_toy.py": "AT = 'inner'\n", "moecheck_pth.pth": code}
    wheel(tmp_path, "moecheck-pth", "1.0", files)
    overlay = make({"moecheck-pth": "1.0"}, Source(wheelhouse=tmp_path), cache)
    assert overlay.folders == (overlay.path, overlay.path / "moecheck_pth" / "inner")
    assert said(overlay, "import deep_toy; print(deep_toy.AT)") == "inner"


# an index, a network, a disk


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of PEP 503: 1.0, 1.1 yanked, 1.2rc1, and 1.3 with the hash of something else."""
    folder = tmp_path / "simple" / TOY
    folder.mkdir(parents=True)
    rows = []
    for version, more in (("1.0", ""), ("1.1", 'data-yanked="it is wrong"'), ("1.2rc1", ""), ("1.3", "")):
        path = wheel(folder, TOY, version)
        digest = hashlib.sha256(path.read_bytes() + b"!" * (version == "1.3")).hexdigest()
        rows.append(f'<a href="{path.name}#sha256={digest}" {more}>{path.name}</a>')
    (folder / "index.html").write_text("<!DOCTYPE html><html><body>" + "\n".join(rows) + "</body></html>")
    return folder.parent


def test_an_index_says_what_is_yanked_and_what_is_early(index: Path, cache: Path) -> None:
    source = Source(index.as_uri())
    listed = wheelhouse.releases(TOY, source)
    assert [(r.version, r.yanked) for r in listed] == [("1.0", False), ("1.1", True), ("1.2rc1", False), ("1.3", False)]
    axis = releases(TOY, source, cache, print)
    assert axis.span("1.0", "1.3") == ("1.0", "1.1", "1.3")  # a pre-release only as an end
    assert axis.span("1.0", "1.2rc1") == ("1.0", "1.1", "1.2rc1")
    assert axis.end("newest") == "1.3"
    assert axis.told("1.1") == "-, yanked"
    assert axis.overlay("1.2rc1").packages == {TOY: "1.2rc1"}
    with pytest.raises(CannotTell, match=r"moecheck-toy==1\.1 is yanked: it is wrong"):
        axis.overlay("1.1")
    with pytest.raises(CannotTell, match=r"moecheck-toy==1\.3: its wheel is corrupt: .*Hash mismatch"):
        axis.overlay("1.3")


class Handler(SimpleHTTPRequestHandler):
    """Serves PEP 691 for the package's page, files else."""

    def send_head(self) -> Any:
        if self.path.endswith("/"):
            self.path += "index.json"
        return super().send_head()

    def guess_type(self, path: Any) -> str:
        return wheelhouse.JSON if str(path).endswith(".json") else super().guess_type(path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(index: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """(URL of an index with 1.0 of 2031-02-03, what stops it)."""
    page = (
        '{"meta": {"api-version": "1.1"}, "name": "%s", "files": [{"filename": "%s", "url": "%s", "hashes": {"sha256": "%s"}, '
    )
    page += '"upload-time": "2031-02-03T00:00:00Z"}]}'
    name = "moecheck_toy-1.0-py3-none-any.whl"
    digest = hashlib.sha256((index / TOY / name).read_bytes()).hexdigest()
    (index / TOY / "index.json").write_text(page % (TOY, name, name, digest))
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(index.parent)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    yield f"http://127.0.0.1:{server.server_port}/simple", stop
    if thread.is_alive():
        stop()


def test_without_a_network(served: tuple[str, Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What uv has seen is enough; else it is nobody's fault, and no answer."""
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    url, stop = served
    assert wheelhouse.releases(TOY, Source(url))[0].date == "2031-02-03"
    with pytest.raises(MoecheckError, match="has no nothing-toy"):
        wheelhouse.releases("nothing-toy", Source(url))
    first = make({TOY: "1.0"}, Source(url), tmp_path / "cache")
    stop()
    assert make({TOY: "1.0"}, Source(url), tmp_path / "cache") == first
    with pytest.raises(OverlayError, match=r"the index http://127\S+ cannot be reached \(.*refused.*\).* --wheelhouse DIR"):
        make({TOY: "1.0"}, Source(url), tmp_path / "other")
    with pytest.raises(OverlayError, match="cannot be reached"):
        wheelhouse.releases(TOY, Source(url))
    told: list[str] = []
    stored = releases("flashinfer-python", Source(url), tmp_path, told.append)
    assert stored.span("0.6.4", "0.6.5") == ("0.6.4", "0.6.5")
    assert "the releases whose contracts are stored are taken" in told[0]


def test_an_index_that_is_none(tmp_path: Path) -> None:
    for source, text in (
        (Source("ftp://x"), "wanted an URL"),
        (Source(wheelhouse=tmp_path / "no"), "no such folder"),
        (Source(wheelhouse=tmp_path), "has no wheel of moecheck-toy"),
    ):
        with pytest.raises(MoecheckError, match=text):
            wheelhouse.releases(TOY, source)


def test_a_full_disk_is_no_answer(cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands in for the disk; what has room is made by the next try."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    make({TOY: "1.1"}, Source(wheelhouse=wheels), cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OverlayError, match=r"no room under .*free some, or delete that folder"):
            make({TOY: "8.0"}, Source(wheelhouse=wheels), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert make({TOY: "8.0"}, Source(wheelhouse=wheels), cache).packages == {TOY: "8.0"}
    denied = cache / "file"
    denied.touch()
    with pytest.raises(OverlayError, match="cannot be written"):
        make({TOY: "1.1"}, Source(wheelhouse=wheels), denied)


def test_many_at_once_build_one(tmp_path: Path, wheels: Path) -> None:
    """And what a killed build left is swept away."""
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make({TOY: "1.0"}, Source(wheelhouse=wheels), cache), range(4)))
    assert len({overlay.path for overlay in made}) == 1
    place = made[0].path
    (place / env.MANIFEST).unlink()
    (place.parent / f".{place.name}.dead").mkdir()
    assert make({TOY: "1.0"}, Source(wheelhouse=wheels), cache).path == place
    assert sorted(p.name for p in place.parent.iterdir()) == sorted([place.name, f"{place.name}.lock"])
    assert stat.S_ISDIR(place.stat().st_mode)
    (place / env.MANIFEST).write_text('{"packages": 3}')
    with pytest.raises(OverlayError, match="not an overlay"):
        make({TOY: "1.0"}, Source(wheelhouse=wheels), cache)


def test_the_command_line_prints_the_folder(
    moecheck: Callable[..., Any], wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli_overlay.cache_folder", lambda: cache)
    answer = moecheck("overlay", f"{TOY}==1.1", "--wheelhouse", str(wheels))
    assert (Path(answer.out.strip()) / "moecheck_toy" / "__init__.py").is_file()
    assert "moecheck-toy 1.1" in answer.err
    assert "wanted PACKAGE==VERSION" in moecheck("overlay", TOY).err


def test_preflight_says_what_else_moves(moecheck: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli_preflight.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    wheel(tmp_path, "flashinfer-python", "0.6.5", needs=("iniconfig<1", "moecheck-dep", "torch<2"))
    for name, version in (("iniconfig", "0.5"), ("moecheck-dep", "3.0"), ("torch", "1.0")):
        wheel(tmp_path, name, version)
    options = ("preflight", "flashinfer-python==0.6.5", "--from", "0.6.4", "--backend", "torch_grouped_mm")
    answer = moecheck(*options, "--wheelhouse", str(tmp_path))
    assert answer.code == 0, answer.err
    assert f"moves iniconfig {metadata.version('iniconfig')} -> 0.5, a downgrade\n" in answer.out
    assert "moves moecheck-dep none -> 3.0\n" in answer.out
    assert f"moves torch {metadata.version('torch')} -> 1.0, a downgrade\n" in answer.out
    cut = moecheck(*options, "--index", "http://127.0.0.1:9/simple")
    assert cut.code == 0
    assert (
        "which other packages move is not known: flashinfer-python==0.6.5: the index http://127.0.0.1:9/simple cannot be"
        in cut.out
    )
    wheel(tmp_path, "flashinfer-python", "0.6.5", needs=("moecheck-absent",))
    assert "does not resolve" in moecheck(*options, "--wheelhouse", str(tmp_path)).err


def test_the_real_index_lists_flashinfer_with_dates() -> None:
    try:
        listed = wheelhouse.releases("flashinfer-python", Source())
    except OverlayError as error:
        pytest.skip(f"needs the real index: {error}")
    dates = {r.version: r.date for r in listed}
    assert dates["0.6.5"] > dates["0.6.4"] > "2025"
