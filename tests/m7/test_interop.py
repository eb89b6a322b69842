"""The same checkpoint in GPTQModel and here; runs where GPTQModel is installed (`make gptq-interop`)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel has an environment of its own: make gptq-interop")

from common.config import DEFAULT_MODEL
from common.text.tokenizer import Tokenizer
from stages.m7_gptq.checkpoint import texts
from stages.m7_gptq.checkpoint.quantize import quantize, short_name
from stages.m7_gptq.checkpoint.texts import DATA, tokens
from stages.m7_gptq.settings import Settings
from tests.m7.interop import ACT_ORDER, OURS, compare


@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", [*OURS, ACT_ORDER], ids=short_name)
def test_the_same_logits_in_gptqmodel(
    settings: Settings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "SEQUENCES", 4)  # enough to deal the inputs to groups
    text = tokens(tokenizer, DATA / "evaluation.txt")[:256]
    result = compare(quantize(DEFAULT_MODEL, settings, tmp_path / "made", progress=False).folder, text)
    assert result["within_tolerance"], result
    assert result["same_greedy_tokens"], result
