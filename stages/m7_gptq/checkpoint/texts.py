"""The texts of the stage: one to calibrate on, another to measure on. For their origin see `data/README.md`."""

import hashlib
from pathlib import Path

import torch

from common.errors import UserError
from common.text.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
CALIBRATION = DATA / "calibration.txt"
SEQUENCES = 64
LENGTH = 512  # of calibration: the number of sequences, and the tokens of each
FEWEST_TOKENS = 2048  # with fewer, most inputs' Hessian rests on the damping alone


def calibration_tokens(tokenizer: Tokenizer | None, path: Path | None = None) -> torch.Tensor:
    """Token ids [sequences, LENGTH] from the start of a text, fewer of a shorter one; `UserError` if too few."""
    ids = tokens(tokenizer, path or CALIBRATION)
    count = min(SEQUENCES, len(ids) // LENGTH)
    if count * LENGTH < FEWEST_TOKENS:
        hint = f"give {FEWEST_TOKENS} at least, better 32,768"
        raise UserError(f"{len(ids)} tokens of calibration text are too few: {hint}")
    return ids[: count * LENGTH].view(count, LENGTH)


def tokens(tokenizer: Tokenizer | None, path: Path) -> torch.Tensor:
    """All tokens of a text file, int64 [n], without special tokens."""
    if tokenizer is None:
        raise UserError("the model has no tokenizer, so that no text can be put before it: --method rtn needs none")
    return torch.tensor(tokenizer.backend.encode(read(path), add_special_tokens=False).ids)


def read(path: Path) -> str:
    """A text file; `UserError` if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: give another file") from error


def fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
