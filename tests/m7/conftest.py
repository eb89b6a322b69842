"""A small quantised model, in a folder. Without a GPU, the kernels run under Triton's interpreter."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tests.triton_interpreter  # noqa: F401
from common.models.load import open_source
from common.models.weights import tensor_shapes
from stages.m7_gptq import quantize as module
from stages.m7_gptq.quantize import quantize
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY

Make = Callable[..., Path]
Frozen = Callable[[str], str]


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """The folder of a random model: the same weights, however often and in whatever order they are read."""

    @functools.cache
    def freeze(model: str) -> str:
        folder = tmp_path_factory.mktemp(model.replace(":", "-"))
        source = open_source(model)
        tensors = {name: source.read(name, shape) for name, shape in tensor_shapes(source.config).items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(source.config.to_hf()[0]))
        return str(folder)

    return freeze


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
