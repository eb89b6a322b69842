"""The reader's own copies of the notebooks, in `notebooks/mine`, and JupyterLab on them."""

import hashlib
import os
import sys
from contextlib import suppress
from typing import NoReturn

from benchmarks.files import check_writable, write_atomically, write_json
from common.errors import UserError
from notebooks import pairs
from notebooks.starters.tasks import read_own, read_record

WRITTEN = ".written.json"
"""The hash of what we wrote last, by the notebook's name. A file with another one is the reader's."""
OPTIONS = (
    "--ServerApp.ip=127.0.0.1",
    "--ServerApp.answer_yes=True",  # to Ctrl-C
    "--ServerApp.allow_root=True",
    "--PasswordIdentityProvider.hashed_password=",  # whatever the user's settings say: a token
    "--ServerApp.jpserver_extensions={'jupytext': False, 'jupyterlab_jupytext': False}",  # it would pair the copies
    "--KernelManager.transport_encryption=auto",  # without it each kernel warns that it has none
    "--Application.log_level=ERROR",
)


def refresh() -> list[str]:
    """Copy notebooks that are missing, and those whose copy is untouched and old. Returns the names of those that the
    reader changed and that have a newer version: they stay."""
    import nbformat

    record = pairs.MINE / WRITTEN
    written: dict[str, str] = {}
    with suppress(UserError):  # broken: what is there counts as the reader's
        written = read_record(record)
    behind: list[str] = []
    for name in pairs.names():
        content = (nbformat.writes(pairs.read_source(name, pairs.MINE)) + "\n").encode()
        path, fresh = pairs.notebook_path(name, pairs.MINE), hashlib.sha256(content).hexdigest()
        own = read_own(path)
        if own in (None, content) or hashlib.sha256(own or b"").hexdigest() == written.get(name):
            if own != content:
                write_atomically(path, lambda scratch, content=content: scratch.write_bytes(content))
            written[name] = fresh
        elif written.get(name) != fresh:
            behind.append(name)
    check_writable(record)
    write_json(record, written)
    return behind


def open_lab(name: str) -> NoReturn:
    """JupyterLab instead of this process, with that notebook's copy open. Jupyter prints its address and token."""
    behind = refresh()
    print("your copies of the notebooks are in notebooks/mine; if you delete one, `make lab` makes a fresh one")
    if behind:
        print(f"these have a newer version than your changed copy: {', '.join(behind)}")
    print("Ctrl-C ends JupyterLab; it starts now and prints its address", flush=True)
    shown = sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    own = (
        f"--ServerApp.root_dir={pairs.ROOT}",  # so that links to the sources open
        f"--LabApp.default_url=/lab/tree/{pairs.notebook_path(name, pairs.MINE).relative_to(pairs.ROOT).as_posix()}",
        f"--ServerApp.open_browser={shown}",  # not a text browser in this terminal
    )
    path = os.pathsep.join(filter(None, (str(pairs.ROOT), os.environ.get("PYTHONPATH"))))
    os.execve(sys.executable, [sys.executable, "-m", "jupyterlab", *OPTIONS, *own], {**os.environ, "PYTHONPATH": path})
