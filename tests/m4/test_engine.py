"""The engine runs the backend that was asked for, answers as m0 does, and says what it chose and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch

from benchmarks.contestant import Setting
from benchmarks.measure import AttentionClock
from benchmarks.stage_contestant import StageContestant
from benchmarks.workloads import find_size
from common import Engine
from common.cli import run_app, stage_app
from common.execution.cpu.fused_cpu import CompiledOps
from common.models import PRESETS
from common.models.ops import Ops
from stages.m4_flash_attention.attention import FlashAttention
from stages.m4_flash_attention.engine import build as build_m4
from tests.conftest import TINY
from tests.depth import DEEP
from tests.engine_checks import exactly, prompts_of, tokens
from tests.test_cli import ROOT
from tests.test_cli import TINY as OPTIONS

Build = Callable[..., Engine]
PROMPTS = prompts_of((1, 15, 16, 17, 70))
FEW_PROMPTS = prompts_of((1, 15, 16, 33))
"""For Triton's interpreter: blocks of 16 that are full after the prompt, and two tokens later; two tiles of 32 keys."""
BACKENDS = ("naive", "torch", "cpu") + (() if torch.cuda.is_available() else ("triton",))
"""With a GPU, Triton compiles for it and leaves the CPU alone: tests/gpu runs it there."""


ANSWERS = [(model, name) for model in TINY for name in BACKENDS if DEEP or (model, name) != (TINY[1], "triton")]
"""tiny-qwen2 differs from tiny-llama in biases only, of which a kernel of attention sees nothing."""


@pytest.mark.parametrize(("model", "name"), ANSWERS)
def test_the_backend_asked_for_is_the_one_that_answers(build: Build, model: str, name: str) -> None:
    prompts, params = (PROMPTS, exactly(6)) if DEEP or name != "triton" else (FEW_PROMPTS, exactly(3))
    expected = build("m0", model=model, max_num_seqs=3).generate(prompts, params)
    engine = build("m4", model=model, max_num_seqs=3, attention_backend=name)
    assert tokens(engine.generate(prompts, params)) == tokens(expected)
    assert engine.metrics()["attention"] == f"attention: {name}, as asked for"
    attention = engine.runner.attention
    if name == "naive":
        assert isinstance(attention, FlashAttention), "the definition itself"
        return
    kind = type(attention._backend).__name__  # pyright: ignore[reportAttributeAccessIssue]
    assert kind.lower().removesuffix("backend") == {"torch": "gather"}.get(name, name)


HEADS_OF_32 = {name: replace(PRESETS[name], head_dim=32) for name in ("tiny-qwen2", "tiny-qwen3")}
"""With biases and with norms of heads, and wide enough for the CPU's kernel that rotates and stores."""


@pytest.mark.parametrize("stage", ["m3", "m4", "m5", "m6"])
@pytest.mark.parametrize("preset", HEADS_OF_32)
def test_fused_kernels_on_a_cpu_are_used_and_change_no_token(
    build: Build, preset: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, preset, HEADS_OF_32[preset])
    options: dict[str, Any] = {"model": f"random:{preset}", "max_num_seqs": 3}
    expected = tokens(build("m0", **options).generate(PROMPTS, exactly(6)))
    for fused in (True, False) if stage != "m3" else (None,):
        engine = build(stage, **options, **({} if fused is None else {"fused_kernels": fused}))
        assert type(engine.runner.model.ops) is (CompiledOps if fused else Ops)
        attention, begun = engine.runner.attention, Mock(side_effect=engine.runner.attention.attend)
        vars(begun)["__self__"] = attention
        vars(attention)["attend"] = begun
        assert tokens(engine.generate(PROMPTS, exactly(6))) == expected
        assert begun.called != bool(fused), "with fused kernels it is `fused_qkv` that is called"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton leaves the CPU alone")
def test_a_single_decode_in_one_kernel_changes_no_token(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fused operations attention takes heads as the projection gives them, and the clock sees it."""
    from common.execution.gpu import triton_gemv
    from common.execution.gpu.fused import FusedOps

    monkeypatch.setattr(triton_gemv, "MIN_PROGRAMS", 1)  # the interpreter runs one after another
    monkeypatch.setattr(triton_gemv, "BYTES_PER_PROGRAM", 1 << 20)
    prompt = prompts_of((5,))
    expected = build("m0", max_num_seqs=1).generate(prompt, exactly(4))
    engine = build("m4", max_num_seqs=1, attention_backend="triton")
    engine.runner.model.ops = FusedOps(engine.runner.model.device)
    attention, layers = engine.runner.attention, len(engine.runner.model.layers)
    backend: Any = vars(attention)["_backend"]
    single = MagicMock(side_effect=backend._fused_qkv)
    monkeypatch.setattr(backend, "_fused_qkv", single)
    with AttentionClock(attention, engine.runner.model.device, lambda: 4 * layers) as clock:
        assert tokens(engine.generate(prompt, exactly(4))) == tokens(expected)
    assert single.call_count == 3 * layers, "every step but the prompt's"
    assert clock.seconds() is not None, "the clock missed calls"


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        run_app(stage_app(ROOT / "stages" / "m4_flash_attention", build_m4), arguments)
    assert end.value.code == 0
    return capsys.readouterr()


CHOSEN = "attention: cpu (reads the blocks in place; of those measured on a CPU the fastest)"


@pytest.mark.parametrize("command", [("generate", "--token-ids", "1 2 3", "--max-tokens", "2"), ("demo",)])
def test_auto_reports_its_choice_once(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Must not keep it to itself."""
    _, err = cli(capsys, *command, *OPTIONS)
    assert err.splitlines().count(CHOSEN) == 1


def test_json_output_is_followed_by_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = cli(capsys, "generate", "--token-ids", "1 2 3", "--max-tokens", "2", "--json", *OPTIONS)
    assert len(out.splitlines()) == 1
    assert "attention" not in err


def test_stage_without_a_choice_reports_none(build: Build) -> None:
    assert build("m3").metrics()["attention"] is None


def test_record_of_a_bench_says_which_backend_ran() -> None:
    setting = Setting.of(TINY[0], "fp32", "cpu", find_size("mixed", None, "quick"), {})
    notes: list[str | None] = []
    for stage in ("m3", "m4"):
        contestant = StageContestant(stage, setting)
        notes.append(contestant.note)
        contestant.close()
    assert notes == [None, CHOSEN]
