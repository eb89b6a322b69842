"""Checkpoints back and forth between m7 and GPTQModel: `make gptq-interop`, in an environment that has GPTQModel.

Most of ours are rounded to nearest: that takes seconds, and the format is the same. With act-order the algorithm deals
the groups, so that one is quantised. Theirs are made by GPTQModel's own quantiser from our calibration text, and the
same settings by ours from the same text: two perplexities and two times to compare, all in float32.
"""

import argparse
import importlib.metadata
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.files import write_json
from benchmarks.quality import CONTEXT, TOKENS, attend, measure
from common.config import DEFAULT_MODEL
from common.models.load import load_tokenizer
from common.models.sources.embedded import open_embedded
from common.models.sources.gptq_folder import GPTQFolder
from common.models.weights import build_decoder
from stages.m7_gptq.checkpoint.baselines import RTN
from stages.m7_gptq.checkpoint.quantize import quantize, short_name
from stages.m7_gptq.checkpoint.texts import DATA, calibration_tokens, tokens
from stages.m7_gptq.settings import Settings

TOLERANCE = 2e-3
"""Largest difference of logits (they reach about 30) between two float32 programs that multiply in another order."""

OURS = (
    RTN(group_size=64, symmetric=True),
    RTN(group_size=32, symmetric=False),
    RTN(group_size=128, symmetric=True),  # 576 inputs: a last group of 64
    RTN(group_size=64, symmetric=True, bits=8),
    RTN(group_size=-1, symmetric=True),
)

ACT_ORDER = Settings(group_size=32, desc_act=True)
"""Asymmetric; the symmetric one is among those that are compared with GPTQModel's own."""

THEIRS = tuple(Settings(group_size=64, symmetric=True, desc_act=desc_act) for desc_act in (False, True))


def load_theirs(folder: Path) -> Any:
    """The folder in GPTQModel, by its plain PyTorch kernel on the CPU. It loads 16-bit numbers only: float16, in which
    scales are stored, and computes in float32 after a cast."""
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return getattr(model, "model", model).float()


@torch.inference_mode()
def compare(folder: Path, text: torch.Tensor, count: int = CONTEXT) -> dict[str, Any]:
    """Logits of one folder in both programs, and its perplexity over `count` tokens; text: token ids [n]."""
    ours = build_decoder(GPTQFolder(folder), torch.float32, torch.device("cpu"), False)
    perplexity, _ = measure(ours, text[:count])
    head = text[:256]
    hidden = ours(head, torch.arange(len(head)), attend)
    mine = ours.logits(hidden)
    theirs = load_theirs(folder)(input_ids=head[None]).logits[0].float()
    difference = float((mine - theirs).abs().max())
    return {
        "largest_difference": difference,
        "largest_logit": float(mine.abs().max()),
        "same_greedy_tokens": bool((mine.argmax(-1) == theirs.argmax(-1)).all()),
        "perplexity": perplexity,
        "tokens": min(len(text), count),
        "within_tolerance": difference < TOLERANCE,
    }


def quantize_theirs(source: Path, settings: Settings, folder: Path) -> None:
    """GPTQModel's plain algorithm (no act_group_aware) on our calibration text."""
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        desc_act=settings.desc_act,
        act_group_aware=False,
    )
    ids = calibration_tokens(load_tokenizer(DEFAULT_MODEL))
    text = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model = GPTQModel.load(str(source), config, device="cpu")
    model.quantize(text, batch_size=8)
    model.save(str(folder))


def measured(make: Callable[[], object], folder: Path, text: torch.Tensor, count: int) -> dict[str, Any]:
    """Both programs on the folder that `make` writes, and the seconds that this took."""
    started = time.perf_counter()
    make()
    seconds = time.perf_counter() - started
    found = {**compare(folder, text, count), "seconds": seconds}
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("reports/local/gptq_interop.json"))
    path: Path = parser.parse_args().json
    source = open_embedded()
    text = tokens(load_tokenizer(DEFAULT_MODEL), DATA / "evaluation.txt")[:TOKENS]
    versions = {name: importlib.metadata.version(name) for name in ("gptqmodel", "transformers", "torch")}
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    record: dict[str, Any] = {"environment": environment(), "versions": versions, "model": DEFAULT_MODEL}
    record |= {"ours": ours, "theirs": theirs}
    with tempfile.TemporaryDirectory() as scratch:
        for settings in (*OURS, ACT_ORDER):
            name, folder = short_name(settings), Path(scratch) / short_name(settings)
            ours[name] = measured(partial(quantize, DEFAULT_MODEL, settings, folder), folder, text, CONTEXT)
            write_json(path, record)
        for settings in THEIRS:
            same = replace(settings, search=False)  # GPTQModel's own, `mse`, is off by default
            name, folder = short_name(same), Path(scratch) / f"theirs-{short_name(same)}"
            theirs[name] = measured(partial(quantize_theirs, source.folder, settings, folder), folder, text, TOKENS)
            folder = Path(scratch) / f"ours-{name}"
            ours[name] = measured(partial(quantize, DEFAULT_MODEL, same, folder), folder, text, TOKENS)
            theirs[name]["perplexity_of_ours"] = ours[name]["perplexity"]
            write_json(path, record)
    rows = [*ours.values(), *theirs.values()]
    wrong = [row for row in rows if not row["within_tolerance"] or not math.isfinite(row["perplexity"])]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checkpoints give the same logits in both; written to {path}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
