"""What there is to build: the tasks of `tasks.toml`, with the learner's files and how far they are."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from notebooks.starters.blank import Blank, starter

ROOT = Path(__file__).parent.parent.parent
MINE = ROOT / "notebooks" / "mine"


@dataclass(frozen=True)
class Check:
    """A behaviour: tests that hold it (pytest's ids), and what helps where they do not."""

    says: str
    hint: str
    tests: list[str]


@dataclass(frozen=True)
class Task:
    """One idea to write. demo: a command of the stage that shows it, or a module. only: tests have many parameters, and
    of those named here the task needs one value."""

    name: str
    stage: str  # the folder's name
    title: str
    minutes: int
    blanks: list[Blank]
    checks: list[Check]
    only: dict[str, str]
    demo: Sequence[str] = ("demo",)
    asked: str = ""  # the question of an interview that this is

    @property
    def short(self) -> str:
        return self.stage.split("_")[0]

    @cached_property
    def lessons(self) -> list[Path]:
        """The files that the task is cut out of, relative to the root."""
        return list(dict.fromkeys(Path(blank.file) for blank in self.blanks))

    def mine(self, lesson: Path) -> Path:
        """The learner's file."""
        return MINE / self.short / lesson.name

    def modules(self) -> dict[str, str]:
        """The learner's files by the names of the modules that they stand for."""
        return {".".join(lesson.with_suffix("").parts): str(self.mine(lesson)) for lesson in self.lessons}

    def starter(self, lesson: Path) -> str:
        source = (ROOT / lesson).read_text(encoding="utf-8")
        return starter(source, [blank for blank in self.blanks if Path(blank.file) == lesson])

    def write(self, fresh: bool) -> list[Path]:
        """Write the starters that are missing; fresh: all, with what was there kept beside them. Returns the new."""
        written: list[Path] = []
        for lesson in self.lessons:
            mine = self.mine(lesson)
            if mine.exists() and fresh and mine.read_text(encoding="utf-8") != self.starter(lesson):
                backups = (mine.with_suffix(f".py.bak{number or ''}") for number in range(1000))
                mine.rename(next(path for path in backups if not path.exists()))
            if not mine.exists():
                mine.parent.mkdir(parents=True, exist_ok=True)
                mine.write_text(self.starter(lesson), encoding="utf-8")
                written.append(mine)
        return written

    def state(self) -> str:
        files = [(lesson, self.mine(lesson)) for lesson in self.lessons]
        texts = [(mine.read_text(encoding="utf-8"), self.starter(lesson)) for lesson, mine in files if mine.exists()]
        if all(own == given for own, given in texts):
            return "not started"
        return "right" if _passed().get(self.name) == self._fingerprint() else "in work"

    def remember(self) -> None:
        """These files are right, as they are now."""
        (MINE / ".right.json").write_text(json.dumps(_passed() | {self.name: self._fingerprint()}))

    def _fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join(Path(path).read_bytes() for path in self.modules().values())).hexdigest()


def _passed() -> dict[str, str]:
    try:
        return json.loads((MINE / ".right.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def tasks() -> list[Task]:
    """In the order of the stages."""
    with (Path(__file__).parent / "tasks.toml").open("rb") as file:
        return [_task(name, entry) for name, entry in tomllib.load(file).items()]


def _task(name: str, entry: dict[str, Any]) -> Task:
    short = entry["stage"].split("_")[0]
    for check in entry["check"]:
        check["tests"] = [f"tests/{short}/test_steps.py{t}" if t.startswith("::") else t for t in check["tests"]]
    lists = {"blanks": [Blank(**b) for b in entry.pop("blank")], "checks": [Check(**c) for c in entry.pop("check")]}
    return Task(name, **({"only": {"stage": short}} | entry | lists))
