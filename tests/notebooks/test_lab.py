"""The reader's own copies: made, refreshed while untouched, and never overwritten; and JupyterLab on them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from common.errors import UserError
from notebooks import copies, pairs

SOURCE = '# %% [markdown]\n# # Title\n# See [the guide](../reports/guide.md).\n\n# %% tags=["setup"]\nimport stages\n'


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one notebook, `m1_small`; the folder of its reader."""
    monkeypatch.setattr(pairs, "ROOT", tmp_path)
    monkeypatch.setattr(pairs, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setattr(pairs, "MINE", folder := tmp_path / "notebooks/mine")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/m1_small.py").write_text(SOURCE)
    return folder


def texts(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def test_links_and_imports_work_from_the_copys_folder(mine: Path) -> None:
    assert copies.refresh() == []
    text, setup = texts(mine / "m1_small.ipynb")
    assert "[the guide](../../reports/guide.md)" in text
    assert 'os.path.abspath("../..")' in setup.splitlines()[0]
    assert setup.endswith("import stages")


def test_an_untouched_copy_follows_the_source_and_a_changed_one_stays(mine: Path) -> None:
    copy, source = mine / "m1_small.ipynb", mine.parent / "m1_small.py"
    copies.refresh()
    source.write_text(SOURCE.replace("Title", "New title"))
    assert copies.refresh() == []
    assert "New title" in copy.read_text()

    copy.write_text(copy.read_text().replace("New title", "My title"))
    assert copies.refresh() == []
    source.write_text(SOURCE.replace("Title", "Newer title"))
    assert copies.refresh() == ["m1_small"]
    assert "My title" in copy.read_text()
    assert copies.refresh() == ["m1_small"]

    copy.unlink()
    assert copies.refresh() == []
    assert "Newer title" in copy.read_text()


def test_copies_whose_record_is_lost_count_as_changed(mine: Path) -> None:
    copies.refresh()
    (mine / copies.WRITTEN).unlink()
    (mine / "m1_small.ipynb").write_text("mine")
    copies.refresh()
    assert (mine / "m1_small.ipynb").read_text() == "mine"


@pytest.mark.parametrize("record", [b"{", b"[]", b"\xe9"])
def test_a_broken_record_makes_changed_copies_the_readers(mine: Path, record: bytes) -> None:
    copies.refresh()
    copy = mine / "m1_small.ipynb"
    fresh = copy.read_bytes()
    (mine / copies.WRITTEN).write_bytes(record)
    assert copies.refresh() == [], "an untouched copy is known by its content"
    copy.write_text("mine")
    (mine / copies.WRITTEN).write_bytes(record)
    assert copies.refresh() == ["m1_small"] and copy.read_text() == "mine"
    copy.unlink()
    assert copies.refresh() == [] and copy.read_bytes() == fresh


@pytest.mark.parametrize("path", [".", "m1_small.ipynb", copies.WRITTEN])
def test_what_is_in_the_way_of_a_copy_is_said_in_a_line(mine: Path, path: str) -> None:
    if path == ".":
        mine.write_text("a file")
    else:
        (mine / path).mkdir(parents=True)
    says = "it is a folder" if path == copies.WRITTEN else "Rename what is in its place"
    with pytest.raises(UserError, match=says):
        copies.refresh()


def test_a_kernel_in_the_readers_folder_imports_this_repository(tmp_path: Path) -> None:
    """As an editor starts it: in the folder of the notebook, and with another FoloVLLM installed."""
    other = tmp_path / "other"
    (other / "stages").mkdir(parents=True)
    (other / "stages/__init__.py").touch()
    [setup] = [
        c.source for c in pairs.read_source("m1_kv_cache", pairs.MINE).cells if "setup" in c.metadata.get("tags", [])
    ]
    code = f"{setup.splitlines()[0]}\nimport importlib.util\nprint(importlib.util.find_spec('stages').origin)"
    pairs.MINE.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(other)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=pairs.MINE, env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(pairs.ROOT / "stages/__init__.py"), found.stderr


def test_lab_listens_on_this_machine_only_and_opens_the_stages_copy(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append((command, environment)))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    copies.open_lab("m1_small")
    [(command, environment)] = started
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--LabApp.default_url=/lab/tree/notebooks/mine/m1_small.ipynb" in command
    assert "--ServerApp.open_browser=False" in command
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(pairs.ROOT)
    assert "fresh one" in capsys.readouterr().out


def test_without_jupyterlab_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs jupyterlab, .* pip install '\.\[lab\]'"):
        pairs.require_packages("lab", "jupyterlab")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a JupyterLab that was started as `make stage3 lab` starts it; Ctrl-C must end it without a traceback."""
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "notebooks", "m3", "--lab"]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=pairs.ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while (found := re.search(r"http://127\S+token=\w+", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="JupyterLab is not installed: make lab")
def test_lab_serves_the_copy_and_its_links_to_the_owner_of_the_token(address: str) -> None:
    base, token = address.split("/lab/")[0], address.split("token=")[1]

    def fetch(path: str, token: str = token) -> Any:
        request = urllib.request.Request(f"{base}{path}", headers={"Authorization": f"token {token}"})
        return urllib.request.urlopen(request).read()

    assert address.split("?")[0].endswith("/lab/tree/notebooks/mine/m3_paged_kv.ipynb")
    assert b"JupyterLab" in fetch("/lab")
    notebook = json.loads(fetch("/api/contents/notebooks/mine/m3_paged_kv.ipynb"))
    assert notebook["writable"]
    assert fetch("/api/contents/reports/interview_guide.md")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch("/api/contents/notebooks", token="wrong")
