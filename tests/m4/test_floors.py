"""The root of the stage is its lesson: one way into `fast/`, and a definition that runs without Numba and Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.test_imports import imports

STAGE = Path(__file__).parents[2] / "stages" / "m4_flash_attention"
NAIVE = """
import sys
sys.modules["numba"] = sys.modules["triton"] = None  # as if they were not installed
import stages
from common import SamplingParams
from stages.m4_flash_attention.attention import FlashAttention
options = dict(model="random:tiny-qwen3", dtype="fp32", device="cpu", block_size=4)
prompts, params = [[5, 6, 7], list(range(1, 18))], SamplingParams(max_tokens=9, ignore_eos=True)
engine = stages.build("m4", attention_backend="naive", **options)
assert type(engine.runner.attention) is FlashAttention
del options["block_size"]
expected = stages.build("m0", **options).generate(prompts, params)
assert [o.token_ids for o in engine.generate(prompts, params)] == [o.token_ids for o in expected]
assert not any("fast.kernels" in name for name in sys.modules)
"""


def root() -> list[Path]:
    return sorted(STAGE.glob("*.py"))


def test_the_root_is_read_in_ten_minutes() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in root()) <= 160


def test_only_the_wiring_imports_from_fast_and_one_function() -> None:
    found = [(path.name, name) for path in root() for name in imports(path.read_text()) if ".fast" in name]
    assert found == [("wiring.py", "stages.m4_flash_attention.fast.choose_attention")]


def test_the_definition_answers_as_m0_without_numba_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", NAIVE], cwd=STAGE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
