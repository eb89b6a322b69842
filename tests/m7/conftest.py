"""A small quantised model, in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.m7_gptq import quantize as module
from stages.m7_gptq.quantize import quantize
from stages.m7_gptq.settings import Settings

Make = Callable[..., Path]


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Calibration text for tiny models."""
    return torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Quantise a tiny model with the given settings; the folder."""
    monkeypatch.setattr(module, "calibration_tokens", lambda tokenizer, path: token_ids)

    def quantized(model: str = "random:tiny-llama", **options: object) -> Path:
        settings = Settings(**({"group_size": 32} | options))  # type: ignore[arg-type]
        return quantize(model, settings, tmp_path / f"made-{settings.name}", progress=False).folder

    return quantized


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A symmetric folder, rounded to nearest, that no test changes."""
    folder = tmp_path_factory.mktemp("gptq") / "saved"
    return quantize("random:tiny-llama", Settings(group_size=32, method="rtn"), folder, progress=False).folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
