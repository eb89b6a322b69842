"""The page's tests need the server's libraries, and a browser that is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.test_cli import TINY

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from common.arena.side import Side

ROOT = Path(__file__).parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser_path() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def missing_for_pages() -> str | None:
    """Why the page cannot be tested here; None where it can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: make setup"
    if browser_path() is None:
        return f"no Chromium is installed (looked for {', '.join(BROWSERS)}): apt-get install chromium"
    return None


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="package")
def sides() -> Iterator[list[Side]]:
    """Processes of two stages, for any number of races: one that was killed is started again for the next one."""
    from common.arena.race import open_sides

    opened = open_sides(["m1_kv_cache", "m4_flash_attention"], TINY)  # m4: kernels that bring threads of their own
    yield opened
    for side in opened:
        side.close()
    assert all(side._process.returncode is not None for side in opened)


@pytest.fixture(scope="package")
def arena() -> Iterator[str]:
    """The URL of `python -m stages arena m1 m3` on a tiny model."""
    command = [sys.executable, "-m", "stages", "arena", "m1", "m3", "--port", "0", *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    greeting = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", greeting)
    assert found, f"{greeting!r} {process.stderr.read() if process.stderr else ''}"
    yield found[0]
    process.terminate()
    assert process.wait(30) in (0, -15)
