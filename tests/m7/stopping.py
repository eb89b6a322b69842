"""What processes of their own run, in the tests of locks and kills."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from stages.m7_gptq import calibrate
from stages.m7_gptq.checkpoint import quantize
from stages.m7_gptq.settings import Settings


def quantize_with_a_stop(model: str, out: Path, call: int) -> None:
    """Quantise a tiny model of 8 projections, stop at one of them (0: at none) until a file `go` is there, and say how
    many were quantised."""
    real, calls = calibrate.gptq, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        while len(calls) == call and not out.with_name("go").exists():
            time.sleep(0.01)
        return real(*arguments)

    vars(calibrate)["gptq"] = stopping
    vars(quantize)["calibration_tokens"] = lambda tokenizer, path: torch.arange(512).view(8, 64)
    quantize.quantize(model, Settings(), out, progress=False)
    print(f"{len(calls)} projections", file=sys.stderr)
