"""What there is to build: the tasks of `tasks.toml`, with the learner's files and how far they are."""

import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.files import write_atomically, write_json
from common.errors import UserError
from notebooks.pairs import MINE, ROOT
from notebooks.starters.blank import Blank, starter


@dataclass(frozen=True)
class Check:
    """A behaviour: tests that hold it (pytest's ids), and what helps where they do not."""

    says: str
    hint: str
    tests: list[str]


@dataclass(frozen=True)
class Task:
    """One idea to write. only: values of parameters that its tests need. demo: a command of the stage that shows it, or
    a module. asked: the question of an interview that it answers. section: of the stage's README, which explains it."""

    name: str
    stage: str  # the folder's name
    title: str
    minutes: int
    blanks: list[Blank]
    checks: list[Check]
    only: dict[str, str]
    demo: list[str] = field(default_factory=lambda: ["demo"])
    asked: str = ""
    section: str = "The idea"

    @property
    def short(self) -> str:
        return self.stage.split("_")[0]

    @property
    def lessons(self) -> list[Path]:
        """The files that it is cut out of, relative to the root."""
        return list(dict.fromkeys(Path(blank.file) for blank in self.blanks))

    @property
    def tests(self) -> list[str]:
        return [test for check in self.checks for test in check.tests]

    def mine(self, lesson: Path) -> Path:
        """The learner's file."""
        return MINE / self.short / lesson.name

    def modules(self) -> dict[str, str]:
        """The learner's files by the names of the modules that they stand for."""
        return {".".join(lesson.with_suffix("").parts): str(self.mine(lesson)) for lesson in self.lessons}

    def starter(self, lesson: Path) -> str:
        source = (ROOT / lesson).read_text(encoding="utf-8")
        return starter(source, [blank for blank in self.blanks if Path(blank.file) == lesson])

    def write(self, fresh: bool) -> bool:
        """Write the starters that are missing; fresh: all, with what was there kept beside them. Was any written?"""
        written = False
        for lesson in self.lessons:
            mine, text = self.mine(lesson), self.starter(lesson).encode()
            if fresh and read_own(mine) not in (None, text):
                backups = (mine.with_suffix(f".py.bak{number or ''}") for number in range(1000))
                mine.rename(next(path for path in backups if not path.exists()))
            if read_own(mine) is None:
                write_atomically(mine, lambda scratch, text=text: scratch.write_bytes(text))
                written = True
        return written

    def state(self) -> str:
        if all(read_own(self.mine(one)) in (None, self.starter(one).encode()) for one in self.lessons):
            return "not started"
        return "right" if read_record(MINE / ".right.json").get(self.name) == self._fingerprint() else "in work"

    def remember(self) -> None:
        """These files are right, as they are now."""
        write_json(MINE / ".right.json", read_record(MINE / ".right.json") | {self.name: self._fingerprint()})

    def _fingerprint(self) -> str:
        contents = (read_own(self.mine(lesson)) for lesson in self.lessons)
        return hashlib.sha256(b"\0".join(filter(None, contents))).hexdigest()


def read_own(path: Path) -> bytes | None:
    """A file in the reader's folder; None where there is none. `UserError` where something else is in its place."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Rename what is in its place or its folder's") from error


def read_record(path: Path) -> dict[str, str]:
    """The hashes that we noted there, by name. `UserError` where it is broken."""
    content = read_own(path) or b"{}"
    try:
        return {str(name): str(value) for name, value in json.loads(content).items()}
    except (AttributeError, ValueError) as error:  # no object; no JSON, or not UTF-8
        raise UserError(f"{path} is broken: delete it; it only notes what was written and checked") from error


@cache
def tasks() -> list[Task]:
    """In the order of the stages."""
    with (Path(__file__).parent / "tasks.toml").open("rb") as file:
        return [_task(name, **entry) for name, entry in tomllib.load(file).items()]


def _task(name: str, stage: str, blank: list[dict[str, Any]], check: list[dict[str, Any]], **entry: Any) -> Task:
    short = stage.split("_")[0]
    for one in check:
        one["tests"] = [f"tests/{short}/test_steps.py{t}" if t.startswith("::") else t for t in one["tests"]]
    blanks, checks = [Blank(**one) for one in blank], [Check(**one) for one in check]
    entry.setdefault("only", {"stage": short})
    return Task(name, stage, blanks=blanks, checks=checks, **entry)
