"""m7's 4-bit model is made before the first cell runs, and only for notebooks that want it."""

from __future__ import annotations

import pytest

from common.config import DEFAULT_MODEL
from notebooks import __main__ as program


@pytest.mark.parametrize(("todo", "made"), [(["m1_kv_cache"], 0), (["m7_gptq"], 1), (["m1_kv_cache", "99_compare"], 1)])
def test_the_model_is_made_once_where_a_notebook_builds_m7(
    todo: list[str], made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(program, "quantize", lambda model, settings: calls.append(model))
    program.prepare(todo)
    assert calls == [DEFAULT_MODEL] * made
