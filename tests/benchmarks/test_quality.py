"""What quantising costs in quality: the table's rows, and their record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import stages
from benchmarks import quality
from benchmarks.quality import (
    DEFINITION,
    M7,
    Row,
    as_engine,
    divergence,
    line,
    measure,
    projection_bytes,
    rows,
)
from common import UserError
from common.models import Decoder, load_model
from common.models.linear import Linear
from common.models.load import open_source
from stages.m7_gptq.head import QuantizedHead
from tests.conftest import TINY
from tests.helpers import all_logits

WITHOUT_FIGURE = json.dumps(
    {
        "model": "tiny",
        "environment": {"commit": "x"},
        "rows": [{**asdict(Row("bf16", 0.0, 1.0, 1, 1)), "perplexity": None}],
    }
)
WHOLE = ("bf16", "int8 head alone")
"""Rows that leave the projections as they are."""


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Calibration text for tiny models."""
    return torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_that_of_each_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "CONTEXT", 16)
    model = load_model(TINY[0])
    text = torch.randint(0, 512, (40,))
    perplexity, likeliest = measure(model, text)
    losses: list[torch.Tensor] = []
    for part in text.split(16):
        logits = all_logits(model, part.tolist())
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], part[1:], reduction="none"))
    assert perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert likeliest.shape == (40,)


def test_every_row_changes_the_weights_and_says_their_bytes(token_ids: torch.Tensor) -> None:
    source = open_source(TINY[0])
    full = projection_bytes(load_model(TINY[0], dtype="bf16"))
    names: list[str] = []
    for name, change in rows(source, token_ids):
        model = load_model(TINY[0], dtype="bf16")
        with torch.inference_mode():
            size = change(source, model)
        share = size / full
        assert share == 1 if name in WHOLE else 0.5 <= share < 0.6 if "int8 RTN" in name else 0.25 < share < 0.32, name
        assert isinstance(model.head, QuantizedHead) == ("int8 head" in name and name not in M7)  # m7's is its own
        names.append(name)
    assert len(set(names)) == len(names) and any("act-order" in name for name in names)


def test_layers_of_m7_are_those_of_its_engine_and_measured_against_their_definition() -> None:
    """A step that decodes gives them few rows at a time: all rows pass, and in their order."""
    source, text = open_source(TINY[0]), torch.randint(0, 512, (40,))
    models: dict[str, Decoder] = {}
    for name, how in M7.items():
        models[name] = load_model(TINY[0], dtype="bf16")
        as_engine(*how, source, models[name])
    definition = models[DEFINITION]
    fast = stages.build("m7", model=TINY[0], dtype="bf16", device="cpu").runner.model.layers[0].qkv_proj
    kinds = [(model.note or "").split(";")[0] for model in models.values()]
    assert kinds == ["QuantizedLinear", *[type(fast).__name__] * 3]
    assert divergence(definition, text, definition) == pytest.approx(0, abs=1e-6)
    far = [divergence(m, text, definition) for m in models.values()]
    assert all(value < 0.01 for value in far) and any(value > 0 for value in far)
    definition.head = Linear(definition.head.weight.roll(1, 0))
    assert divergence(models["m7, decode"], text, definition) > 0.1


def test_rows_given_in_pieces_come_back_in_order() -> None:
    layer, x, sizes = Linear(torch.randn(3, 4)), torch.randn(19, 4), list[int]()

    def seen(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return layer(part)

    seen.weights_bytes = layer.weights_bytes  # type: ignore[attr-defined]
    assert torch.allclose(quality.InPieces(seen, 8)(x), layer(x)) and sizes == [8, 8, 3]  # type: ignore[arg-type]


def test_figures_say_where_they_come_from(tmp_path: Path) -> None:
    path, row = tmp_path / "quality.json", Row("bf16", 20.0, 1.0, 10, 20, commit="one")
    quality._write(path, "tiny", 5, {"bf16": row})
    assert quality.read(path, "tiny") == {"bf16": row} and quality.read(path, "other") == {}
    record = json.loads(path.read_text())
    assert record["environment"]["hardware"]["cpu"] and record["environment"]["versions"]["torch"]
    assert record["rows"][0]["commit"] == "one"


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, WITHOUT_FIGURE, '{"model": "tiny", "rows": [{"name": 1}]}']
)
def test_a_file_that_is_no_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(UserError, match="move it away"):
        quality.read(tmp_path / "quality.json", "tiny")


def test_perplexity_rests_on_thirty_contexts() -> None:
    assert (quality.CONTEXT, quality.TOKENS) == (1024, 30 * 1024)


def test_a_line_of_the_table() -> None:
    base = Row("bf16", 20.0, 1.0, 200_000_000, 250_000_000)
    assert "+10.0%" in line(Row("int4", 22.0, 0.8, 55_000_000, 105_000_000), base)
