"""Judges many versions of lesson files: imports everything else once, and forks for each version.

`python -m tests.notebooks.judge_many`, a list of jobs of `tests.learner` on standard input; writes a list of
what that writes of each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch

import tests.conftest
import tests.engine_checks
import tests.m7.test_gptq  # noqa: F401
from tests import learner


def forget(job: dict[str, Any]) -> None:
    """What may hold something of the lesson is imported again."""
    of_a_stage = all(name.startswith("stages.") for name in job["modules"])
    again = ("stages.m", "tests.m") if of_a_stage else ("stages", "tests", "common")
    for name in [name for name in sys.modules if name.startswith(again)]:
        del sys.modules[name]


def judge(job: dict[str, Any]) -> str:
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            forget(job)
            learner.run(job, out)
            out.flush()
            os._exit(0)
        os.waitpid(child, 0)
        out.seek(0)
        return out.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([judge(job) for job in json.load(sys.stdin)]))
