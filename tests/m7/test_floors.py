"""The root of the stage is its lesson: short, plain PyTorch, and with one way into `fast/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.test_imports import imports

STAGE = Path(__file__).parents[2] / "stages" / "m7_gptq"
PLAIN = """
import sys
sys.modules["numba"] = sys.modules["triton"] = None  # as if they were not installed
import stages
from stages.m7_gptq.head import QuantizedHead
from stages.m7_gptq.linear import QuantizedLinear
from tests.engine_checks import exactly, prompts_of, tokens
from tests.helpers import rounded
options = {"model": sys.argv[1], "dtype": "fp32", "device": "cpu", "kv_cache_memory": 1 << 24}
m0 = stages.build("m0", **options)
m0.runner.model = rounded(sys.argv[1])  # m0 on m7's dequantised weights
m7 = stages.build("m7", linear_backend="naive", **options)
model = m7.runner.model
for layer in model.layers:
    for projection in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj):
        assert isinstance(projection, QuantizedLinear)
assert isinstance(model.head, QuantizedHead)
prompts, outputs = prompts_of((7, 1, 30)), [exactly(count) for count in (9, 20, 3)]
assert tokens(m7.generate(prompts, outputs)) == tokens(m0.generate(prompts, outputs))
"""


def root() -> list[Path]:
    return sorted(STAGE.glob("*.py"))


def test_the_root_is_read_in_ten_minutes() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in root()) <= 650


def test_only_the_engine_imports_from_fast_and_one_function() -> None:
    others = [*root(), *(STAGE / "checkpoint").glob("*.py")]
    found = [(path.name, name) for path in others for name in imports(path.read_text()) if ".m7_gptq.fast" in name]
    assert found == [("engine.py", "stages.m7_gptq.fast.choose.choose_fast")]


def test_the_root_takes_the_commands_and_the_weights_from_checkpoint_and_no_more() -> None:
    found = [(path.name, name) for path in root() for name in imports(path.read_text()) if ".checkpoint." in name]
    assert found == [
        ("__main__.py", "stages.m7_gptq.checkpoint.cli.add_commands"),
        ("load.py", "stages.m7_gptq.checkpoint.model.open_checkpoint"),
    ]


def test_no_module_of_the_stage_imports_the_harness() -> None:
    for path in STAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "benchmarks" for name in imports(path.read_text())), path


@pytest.mark.parametrize("model", TINY)
def test_the_definition_gives_m0s_tokens_without_numba_and_triton(model: str) -> None:
    """`linear_backend=naive`: every layer and the head are dequantised and multiplied, at every call."""
    command = [sys.executable, "-c", PLAIN, model]
    done = subprocess.run(command, cwd=STAGE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
