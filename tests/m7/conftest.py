"""A small quantised model, in a folder. Without a GPU, the kernels run under Triton's interpreter."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from stages.m7_gptq import quantize as module
from stages.m7_gptq.quantize import quantize
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.helpers import freeze

Make = Callable[..., Path]
Frozen = Callable[[str], str]


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """The folder of a random model: the same weights, however often and in whatever order they are read."""

    return functools.cache(lambda model: freeze(model, tmp_path_factory.mktemp(model.replace(":", "-"))))


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Calibration text for tiny models."""
    return torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(frozen: Frozen, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Quantise a tiny model with the given settings; the folder."""
    monkeypatch.setattr(module, "calibration_tokens", lambda tokenizer, path: token_ids)

    def quantized(model: str = TINY[0], **options: object) -> Path:
        settings = Settings(**({"group_size": 32, "symmetric": True} | options))  # type: ignore[arg-type]
        return quantize(frozen(model), settings, tmp_path / f"made-{settings.name}", progress=False).folder

    return quantized


@pytest.fixture(scope="session")
def saved(frozen: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A symmetric folder, rounded to nearest, that no test changes."""
    folder = tmp_path_factory.mktemp("gptq") / "saved"
    return quantize(
        frozen(TINY[0]), Settings(group_size=32, symmetric=True, method="rtn"), folder, progress=False
    ).folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
