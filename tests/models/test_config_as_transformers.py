"""Whatever config.json says: the logits are transformers', or it is refused in one line; never other logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from common import UserError
from common.models import ModelConfig, load_model
from tests.helpers import all_logits
from tests.models import reference

LLAMA, QWEN2, QWEN3 = "llama, 3 queries a KV head", "qwen2", "qwen3, head_dim unlike hidden/heads"
PROMPT = [1, 7, 30, 2, 9, 60, 4, 5, 88, 3] * 20
"""Longer than the original context of the scaled models."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWS = {"use_sliding_window": True, "layer_types": ...}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {case: tmp_path_factory.mktemp("saved") for case in (LLAMA, QWEN2, QWEN3)}
    for case, folder in folders.items():
        reference.save(case, folder)
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values["rope_parameters"]
        path.write_text(json.dumps(values))
    return folders


def changed(folder: Path, changes: dict[str, Any], to: Path) -> Path:
    """A copy of the folder; a change to ... removes the key."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return to


def theirs(folder: Path) -> torch.Tensor | None:
    """None where transformers does not load the folder either."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return reference.logits(model, PROMPT)
    except Exception:  # of whatever kind
        return None


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_theta": 300.0}},
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 3, "attention_factor": None}},
    {"rope_parameters": {"rope_type": "default", "factor": 1.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0, "rope_theta": 2e4}},
    {"rope_scaling": {"type": "linear", "factor": 0.5}, "partial_rotary_factor": None},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 100},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": 200},
    {"rope_scaling": YARN, "original_max_position_embeddings": 20},
    {"rope_scaling": YARN | {"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}},
    {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}},
    {"rope_scaling": YARN | {"mscale": 2.0, "attention_factor": None}},
    {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1.0}},
    {"rope_scaling": YARN | {"beta_fast": 3.5, "beta_slow": 0.1, "truncate": True}},
    {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
    {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1}},
    {"rope_scaling": YARN | {"factor": 1.0}},
    {"original_max_position_embeddings": 20},
]


@pytest.mark.parametrize("case", [LLAMA, QWEN2, QWEN3])
@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_rope_gives_the_logits_of_transformers(
    saved: dict[str, Path], tmp_path: Path, case: str, changes: dict[str, Any]
) -> None:
    folder = changed(saved[case], changes, tmp_path / "model")
    expected, ours = theirs(folder), load_model(str(folder))
    assert expected is not None
    reference.assert_close(all_logits(ours, PROMPT), expected)
    config, generation = ours.config.to_hf()
    assert ModelConfig.from_hf(ours.config.name, config, generation) == ours.config
    again = changed(folder, {"rope_scaling": ..., "rope_theta": ...} | config, tmp_path / "again")
    expected = theirs(again)
    assert expected is not None
    reference.assert_close(all_logits(ours, PROMPT), expected)


OTHERS: list[tuple[dict[str, Any], bool]] = [  # changes, and whether they are accepted by all three
    *(({key: None}, True) for key in ("rope_scaling", "sliding_window", "layer_types", "architectures", "torch_dtype")),
    *(({key: None}, True) for key in ("eos_token_id", "bos_token_id", "quantization_config", "is_causal")),
    *(({key: None}, True) for key in ("per_layer_config", "partial_rotary_factor", "pad_token_id")),
    *(({key: None}, False) for key in ("tie_word_embeddings", "rms_norm_eps", "hidden_act", "vocab_size")),
    *(({key: ...}, True) for key in ("tie_word_embeddings", "rms_norm_eps", "hidden_act", "layer_types")),
    ({"architectures": []}, True),
    ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"], "model_type": "mistral"}, False),
    ({"hidden_act": "swish"}, True),
    ({"hidden_act": "gelu"}, False),
    ({"tie_word_embeddings": "false"}, False),
    ({"tie_word_embeddings": 0}, False),
    ({"is_causal": False}, False),
    ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, False),
    ({"layer_types": []}, False),
    ({"layer_types": ["attention"] * 3}, True),
    ({"layer_types": ["full_attention"] * 2}, False),
    ({"layer_types": ["linear_attention"] * 3}, False),
    ({"num_key_value_heads": 0}, False),
    ({"head_dim": 0}, False),
    ({"eos_token_id": [2, 97, 10**12, -1]}, True),
    ({"eos_token_id": "2"}, False),
    ({"attention_bias": "false", "mlp_bias": "false"}, False),
    ({"pretraining_tp": 4, "attn_logit_softcapping": 30.0, "logits_scaling": 8.0}, True),
    ({"rope_theta": None}, False),
    ({"rope_theta": 0}, False),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, False),
    ({"rope_scaling": {"type": "linear", "factor": None}}, False),
    ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, False),
    ({"rope_scaling": YARN | {"attention_factor": 0}}, False),
    ({"rope_scaling": YARN | {"truncate": None}}, False),
    ({"rope_scaling": YARN | {"truncate": False}}, False),
    ({"rope_scaling": YARN, "original_max_position_embeddings": None}, False),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}}, False),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, False),
]


@pytest.mark.parametrize("case", [LLAMA, QWEN2, QWEN3])
@pytest.mark.parametrize(("changes", "accepted"), OTHERS, ids=str)
def test_other_keys_give_the_logits_of_transformers_or_are_refused(
    saved: dict[str, Path], tmp_path: Path, case: str, changes: dict[str, Any], accepted: bool
) -> None:
    folder = changed(saved[case], changes, tmp_path / "model")
    if not accepted:
        with pytest.raises(UserError) as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)
        return
    ours, expected = load_model(str(folder)), theirs(folder)
    assert expected is not None
    reference.assert_close(all_logits(ours, PROMPT), expected)
    assert ours.config.eos_token_ids in ((2, 5), (2,), ())


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        (QWEN3, {"head_dim": ...}, r"q_proj.weight has shape \[96, 48\], but the configuration says \[768, 48\]"),
        (QWEN3, {"head_dim": None}, "head_dim"),
        (QWEN2, {"num_key_value_heads": ...}, "32 KV heads"),
        (QWEN2, WINDOWS | {"sliding_window": ..., "max_window_layers": 1}, "window"),
        (QWEN2, WINDOWS | {"sliding_window": 0, "max_window_layers": 2}, "window"),
        (QWEN3, {"use_sliding_window": None}, "use_sliding_window"),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_family(
    saved: dict[str, Path], tmp_path: Path, case: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        load_model(str(changed(saved[case], changes, tmp_path / "model")))
