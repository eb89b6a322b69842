"""Mutated model files: each loads and can be run, or is refused in one line; quickly, in little memory, in silence.

`python -m tests.models.fuzz [COUNT [SEED [KIND ...]]]`. A kind is a module that makes mutated files: see `Kind`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common import EngineConfig, UserError
from common.models import load_model, load_tokenizer
from common.models.load import prepare
from tests.helpers import all_logits

SECONDS, MEMORY = 2.0, 64 << 20  # of the processor: others use it too
EXPECTED = (
    *("so prompts must be token ids", "does not say how its tokenizer cuts words"),
    *("are not used", "lm_head.weight is used", "pass max_model_len for more"),
    "so it ends no answer",
)
"""What a loader may say of a file that it takes."""

INTEGERS = [0, 1, 2, 3, 7, 8, -1, -(2**31), 255, 256, 2**31 - 1, 2**32 - 1, 2**63 - 1, 10**9, 10**12]
FLOATS = [0.0, -1.0, 1e-320, 1e-40, 3e38, 1e308, 0.5, 1.0, 2.0, 1e-30, 1e30, float("inf"), float("nan")]
TEXTS = ["", "x", "none", "linear", "yarn", "0", "▁", "\n", "é" * 50, "<|im_end|>", "{{ 1 /", "y" * 5000]


class Kind(Protocol):
    """Makes models that are almost valid."""

    def valid(self, folder: Path) -> list[Path]:
        """Some valid models, written below the folder: what `load_model` takes."""
        ...

    def mutate(self, chance: random.Random, model: Path, folder: Path) -> Path:
        """A model below the folder, empty, like that one but for some random changes."""
        ...


@dataclass
class Tally:
    """outcomes: number of cases by what came of them. wrong: what must not be, one text a case."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])


def fuzz(kind: Kind, count: int, seed: int, scratch: Path) -> Tally:
    tally = Tally()
    (scratch / "valid").mkdir()
    models = kind.valid(scratch / "valid")
    for model in models:
        assert _load(model) == "loads", model
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            model = kind.mutate(chance, chance.choice(models), Path(folder))
            before, start = peak(), time.process_time()
            try:
                outcome = _load(model)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = f"raises {type(error).__name__}"
                tally.wrong.append(f"case {number}: {traceback.format_exc()[-2000:]}")
            seconds, memory = time.process_time() - start, peak() - before
        tally.outcomes[outcome] += 1
        if outcome not in ("loads", "refused"):
            tally.wrong.append(f"case {number}: {outcome}")
        if seconds > SECONDS or memory > MEMORY:
            tally.wrong.append(f"case {number}: {seconds:.1f} s, {memory >> 20} MiB: {outcome}")
    return tally


def _load(model: Path) -> str:
    with _stderr() as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            tokenizer = load_tokenizer(str(model))
            decoder = prepare(load_model(str(model)), tokenizer, EngineConfig(device="cpu"), False).model
            all_logits(decoder, [0] * min(2, decoder.config.max_position_embeddings))
            if tokenizer is not None:
                text = "hello <|im_end|> 12é"
                token_ids = tokenizer.encode(text)
                assert max(token_ids, default=0) < decoder.config.vocab_size, "an id beyond the vocabulary"
                tokenizer.decode(token_ids)
                with tempfile.TemporaryDirectory() as folder:
                    tokenizer.save(Path(folder))
            outcome = "loads"
        except UserError as error:
            line = str(error)
            outcome = "refused" if line.isprintable() and 20 < len(line) < 600 else f"not one line: {line!r}"
    lines = [str(entry.message) for entry in warned] + said
    spam = [line for line in lines if not any(part in line for part in EXPECTED)]
    return outcome if not spam else f"says {spam[0]!r:.300}"


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Lines written on standard error, also by libraries that are not Python's; there are some only at the end."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def nasty(chance: random.Random, depth: int = 0) -> Any:
    """A value that a file should not have at any place."""
    choices = [INTEGERS, FLOATS, TEXTS, [True, False]]
    if depth < 2 and chance.random() < 0.3:
        return [nasty(chance, depth + 1) for _ in range(chance.randrange(4))]
    return chance.choice(chance.choice(choices))


def mutate_bytes(chance: random.Random, data: bytes, end: int | None = None) -> bytes:
    """Some bytes changed, put in, taken out, or everything behind a place; mostly before `end`."""
    at = chance.randrange(len(data) if end is None or chance.random() < 0.2 else end)
    length = chance.choice((1, 1, 2, 4, 8, 100))
    some = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
    change = chance.randrange(4)
    return data[:at] + (some if change < 2 else b"") + (data[at + length * (change != 1) :] if change < 3 else b"")


def kinds() -> dict[str, Kind]:
    from tests.models.fuzz_folder import Folders
    from tests.models.fuzz_gguf import GGUFFiles

    return {"gguf": GGUFFiles(), "folder": Folders()}


def main(arguments: list[str]) -> int:
    count, seed, *names = [*arguments, *("5000", "1")[len(arguments) :]]
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # or a mistake takes the machine
    failed = False
    for name, kind in kinds().items():
        if name in (names or [name]):
            with tempfile.TemporaryDirectory() as scratch:
                tally = fuzz(kind, int(count), int(seed), Path(scratch))
            print(name, dict(tally.outcomes), f"{len(tally.wrong)} wrong", *tally.wrong[:20], sep="\n", flush=True)
            failed = failed or bool(tally.wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
