"""A small quantised model, in a folder. Without a GPU, the kernels run under Triton's interpreter."""

from __future__ import annotations

import functools
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from stages.m7_gptq.calibrate import QuantizedLayer
from stages.m7_gptq.checkpoint import quantize as module
from stages.m7_gptq.checkpoint.baselines import METHODS, quantize_layers
from stages.m7_gptq.checkpoint.quantize import quantize, short_name
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.helpers import freeze

Make = Callable[..., Path]
Frozen = Callable[[str], str]
Command = Callable[..., tuple[int, str]]


@dataclass(frozen=True)
class Made:
    """A quantised folder, and what was computed for it."""

    folder: Path
    layers: list[QuantizedLayer]


GetMade = Callable[..., Made]


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """The folder of a random model: the same weights, however often and in whatever order they are read."""

    return functools.cache(lambda model: freeze(model, tmp_path_factory.mktemp(model.replace(":", "-"))))


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Calibration text for tiny models."""
    return torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(frozen: Frozen, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Quantise a tiny model with the given settings; the folder."""
    monkeypatch.setattr(module, "calibration_tokens", lambda tokenizer, path: token_ids)

    def quantized(model: str = TINY[0], **options: object) -> Path:
        settings = settings_of(**options)
        return quantize(frozen(model), settings, tmp_path / f"made-{short_name(settings)}", progress=False).folder

    return quantized


def settings_of(**options: Any) -> Settings:
    return METHODS[options.pop("method", "gptq")](**({"group_size": 32, "symmetric": True} | options))


@pytest.fixture(scope="session")
def made(frozen: Frozen, token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> GetMade:
    """As `make`, but once for each model and settings: no test changes the folder."""

    @functools.cache
    def quantized(model: str, **options: object) -> Made:
        layers: list[QuantizedLayer] = []

        def recorded(*arguments: Any) -> Iterator[QuantizedLayer]:
            for layer in quantize_layers(*arguments):
                layers.append(layer)
                yield layer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "calibration_tokens", lambda tokenizer, path: token_ids)
            patch.setattr(module, "quantize_layers", recorded)
            out = tmp_path_factory.mktemp("gptq") / "made"
            return Made(quantize(frozen(model), settings_of(**options), out, progress=False).folder, layers)

    return lambda model=TINY[0], **options: quantized(model, **options)


@pytest.fixture(scope="session")
def saved(made: GetMade) -> Path:
    """A symmetric folder, rounded to nearest, that no test changes."""
    return made(method="rtn").folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m stages.m7_gptq ...`, in this process: its exit status, and what it says on standard error."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["m7_gptq", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("stages.m7_gptq", run_name="__main__")
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().err

    return run
