"""The root of the stage is its lesson: short, plain PyTorch, and with one way into `fast/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.test_imports import imports

STAGE = Path(__file__).parents[2] / "stages" / "m7_gptq"
PLAIN = """
import sys
sys.modules["numba"] = sys.modules["triton"] = None  # as if they were not installed
import stages, torch
from common.config import EngineConfig
from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models.linear import Linear
from stages.m7_gptq.checkpoint.model import load_quantized
model = load_quantized(EngineConfig(model="random:tiny-llama", dtype="bf16", device="cpu")).model
from tests.helpers import all_logits
assert isinstance(model.layers[0].down_proj, Linear | OneDnnLinear)
assert all_logits(model, [5, 6, 7]).isfinite().all()
assert not any(name.startswith("stages.m7_gptq.fast") for name in sys.modules)
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
        ("engine.py", "stages.m7_gptq.checkpoint.model.load_quantized"),
    ]


def test_no_module_of_the_stage_imports_the_harness() -> None:
    for path in STAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "benchmarks" for name in imports(path.read_text())), path


def test_the_root_runs_without_numba_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=STAGE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
