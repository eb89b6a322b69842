"""What loading a model takes, measured in a child of its own: `ru_maxrss` is the most that a process ever had."""

from __future__ import annotations

import json
import os
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from common import EngineConfig, UserError
from common.models import load_for
from tests.models.fuzz import peak

SECONDS, MEMORY = 2.0, 64 << 20


def load(model: Path) -> None:
    loaded = load_for(EngineConfig(model=str(model), device="cpu"))
    if loaded.tokenizer is not None:  # as m7 does
        loaded.tokenizer.save(model.parent)


def outcome(work: Callable[[], object]) -> tuple[str, float, int]:
    """(`loads`, or `refused: ...`, or what went wrong; seconds of the processor; bytes more than before)."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        before, start = peak(), time.process_time()
        try:
            work()
            came = "loads"
        except UserError as error:
            came = f"refused: {error}"
        except BaseException:
            came = traceback.format_exc()[-2000:]
        os.write(send, json.dumps([came[:3000], time.process_time() - start, peak() - before]).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    came, seconds, memory = json.loads(said) if said else (f"died of {status}", 0.0, 0)
    return came, seconds, memory


def check_refused(work: Callable[[], object]) -> str:
    """The one line that refuses it, at once and in little memory."""
    came, seconds, memory = outcome(work)
    assert came.startswith("refused: "), came
    assert came.isprintable(), came
    assert seconds < SECONDS and memory < MEMORY, f"{seconds:.1f} s, {memory >> 20} MiB: {came[:300]}"
    return came
