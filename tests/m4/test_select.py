"""Which backend runs, and what the user is told."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from common.errors import UserError
from stages.m4_flash_attention.fast import select
from stages.m4_flash_attention.fast.backends import AttentionShape, flash_attn, triton
from stages.m4_flash_attention.fast.backends import torch as torch_backend

SHAPE = AttentionShape(4, 2, 64, 16, torch.float32, torch.device("cpu"))
GPU = dataclasses.replace(SHAPE, dtype=torch.bfloat16, device=torch.device("cuda"))


def hide(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else real(name, *a))


def install(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name in present else real(name, *a))


def test_auto_on_a_cpu_takes_the_compiled_kernels_and_says_so() -> None:
    choice = select.choose("auto", SHAPE)
    assert choice.name == "cpu"
    assert choice.reason.startswith("attention: cpu (reads the blocks in place")
    assert type(choice.backend).__name__ == "CpuBackend"


def test_auto_without_numba_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not end in an error."""
    hide(monkeypatch, "numba")
    choice = select.choose("auto", SHAPE)
    assert choice.name == "torch"
    assert "not cpu: the package numba is not installed" in choice.reason


def test_auto_falls_back_for_a_head_dimension_that_the_kernels_do_not_know() -> None:
    assert select.choose("auto", dataclasses.replace(SHAPE, head_dim=20)).name == "torch"


@pytest.mark.parametrize("name", ["naive", "torch", "cpu"])
def test_asked_for_backend_is_the_one_that_runs(name: str) -> None:
    assert select.choose(name, SHAPE).name == name


def test_unknown_backend_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'triton'.*flash_attn"):
        select.choose("tritn", SHAPE)


def test_backend_that_cannot_run_says_why_and_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError) as raised:
        select.choose("triton", SHAPE)
    message = str(raised.value)
    assert "needs a GPU, and the device is cpu" in message
    assert "Choose from: auto, cpu, naive, torch" in message
    assert "\n" not in message


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("cpu", {"head_dim": 20}, "steps of 16, not 20"),
    ("cpu", {"device": torch.device("cuda")}, "device is cuda"),
    ("cpu", {"dtype": torch.float64}, "not float64"),
    ("triton", {"dtype": torch.float64}, "not float64"),
    ("triton", {"head_dim": 48}, "not 48"),
    ("triton", {"dtype": torch.bfloat16}, "interpreter"),
    ("flash_attn", {}, "needs a GPU"),
    ("flash_attn", {"device": torch.device("cuda")}, "not installed"),
]


@pytest.mark.parametrize(("name", "change", "reason"), REFUSALS)
def test_reasons(name: str, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hide(monkeypatch, "flash_attn", "flash_attn_interface")
    answer = select.module_of(name).why_not(dataclasses.replace(SHAPE, **change))
    assert answer is not None
    assert reason in answer


def test_auto_on_a_device_that_it_does_not_know_asks_for_a_backend() -> None:
    """Must not end in a KeyError."""
    with pytest.raises(UserError, match=r"auto.*knows cuda and cpu, not mps: name a backend"):
        select.choose("auto", dataclasses.replace(SHAPE, device=torch.device("mps")))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A GPU whose compute capability is the list's one entry; no backend is really created on it."""
    capability = [(9, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for module in (triton, flash_attn, torch_backend):
        monkeypatch.setattr(module, "create", lambda shape: None)
    return capability


def test_auto_on_a_gpu_takes_our_kernels_then_the_library_then_torch(
    hopper: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "installed_version", lambda: 3)
    assert select.choose("auto", GPU).name == "triton"
    hide(monkeypatch, "triton")
    choice = select.choose("auto", GPU)
    assert choice.name == "flash_attn"
    assert "not triton: the package triton is not installed" in choice.reason
    monkeypatch.setattr(flash_attn, "installed_version", lambda: None)
    choice = select.choose("auto", GPU)
    assert choice.name == "torch"
    assert "not triton: " in choice.reason and "not flash_attn: the library is not installed" in choice.reason


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)])
def test_gpu_before_ampere_is_given_only_kernels_that_it_can_run(
    hopper: list[tuple[int, int]], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper[0] = capability
    hide(monkeypatch, "flash_attn", "flash_attn_interface")
    assert select.choose("auto", GPU).name == ("triton" if runs else "torch")
    assert ("capability 8.0" in (triton.why_not(GPU) or "")) is not runs


def test_triton_that_is_not_installed_is_refused_for_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "triton")
    assert "not installed" in (triton.why_not(SHAPE) or "")


def test_flash_attn_2_is_given_only_blocks_that_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "flash_attn_interface")
    install(monkeypatch, "flash_attn")
    monkeypatch.setattr(flash_attn, "installed_version", lambda: 2)
    assert "block_size=256" in (flash_attn.why_not(GPU) or "")
    assert flash_attn.why_not(dataclasses.replace(GPU, block_size=256)) is None
    for dtype in (torch.float32, torch.float64):
        answer = flash_attn.why_not(dataclasses.replace(GPU, dtype=dtype)) or ""
        assert str(dtype).removeprefix("torch.") in answer
    monkeypatch.setattr(flash_attn, "installed_version", lambda: 3)
    assert flash_attn.why_not(GPU) is None


def test_version_3_is_preferred_where_both_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "flash_attn", "flash_attn_interface")
    assert flash_attn.installed_version() is None
    install(monkeypatch, "flash_attn", "flash_attn_interface")
    assert flash_attn.installed_version() == 3
