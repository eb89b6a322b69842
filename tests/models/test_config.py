"""What config.json may say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from common import UserError
from common.models import PRESETS, ModelConfig
from common.models.rope import Llama3Scaling

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf("m", PLAIN | changes, generation)


def test_defaults() -> None:
    plain = config()
    assert (plain.num_kv_heads, plain.head_dim, plain.rope_theta) == (4, 4, 10000.0)
    assert not any((plain.qkv_bias, plain.qk_norm, plain.tie_word_embeddings, plain.rope_scaling))
    assert plain.eos_token_ids == ()


def test_rope_of_transformers_5_and_of_older_files() -> None:
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    new = config(rope_parameters=LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 64})
    old = config(rope_theta=500000.0, rope_scaling=LLAMA3)
    assert new == old
    assert (new.rope_theta, new.rope_scaling) == (500000.0, scaling)
    assert config(rope_theta=1e6, rope_scaling={"type": "default"}).rope_scaling is None


def test_rope_scaling_replaces_rope_parameters_as_in_transformers_5() -> None:
    default = {"rope_type": "default", "rope_theta": 5e5}
    assert config(rope_theta=1e6, rope_scaling=LLAMA3, rope_parameters=default) == config(
        rope_theta=1e6, rope_scaling=LLAMA3
    )
    both = config(rope_theta=1e6, rope_scaling={"rope_type": "default"}, rope_parameters=LLAMA3)
    assert (both.rope_theta, both.rope_scaling) == (1e6, None)


def test_end_tokens_of_both_files() -> None:
    assert config({"eos_token_id": [7, 8]}, eos_token_id=9).eos_token_ids == (7, 8, 9)
    assert config({"eos_token_id": 7}, eos_token_id=7).eos_token_ids == (7,)
    assert config({}, eos_token_id=None).eos_token_ids == ()


def test_a_wrong_end_token_is_named_with_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (True, "2", [2.0]):
        with pytest.raises(UserError, match=r"eos_token_id in generation_config\.json must be token ids"):
            config({"eos_token_id": wrong}, eos_token_id=2)
        with pytest.raises(UserError, match=r"eos_token_id in config\.json must be token ids"):
            config({}, eos_token_id=wrong)
    assert config({"eos_token_id": [10**12, 7]}, eos_token_id=-1).eos_token_ids == (7,)
    assert "eos_token_id 1000000000000 is outside of the vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_hf_form_gives_the_same_configuration_back(preset: str) -> None:
    original = PRESETS[preset]
    assert ModelConfig.from_hf(original.name, *original.to_hf()) == original


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": [], "model_type": "gpt2"}, "gpt2"),
        ({"architectures": None}, "none named"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1]}}, "'mrope'"),
        ({"rope_scaling": {"factor": 2.0}}, "factor 2.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "alpha 3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "factor of type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor of type"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"sliding_window": 32}, "sliding_window 32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"head_dim": 5}, "odd"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "abc"}, "'abc'"),
        ({"rope_scaling": "yarn"}, "'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": LLAMA3 | {"factor": "a"}}, "factor"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "'yarn'"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"architectures": 5}, "cannot be understood"),
        ({"layer_types": 5}, "cannot be understood"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": None,
            },
            "max_window_layers",
        ),
    ],
)
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        config(**changes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sliding_window_that_is_off_is_no_obstacle() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "num_key_value_heads": 4}
    config(**qwen, use_sliding_window=False, max_window_layers=0)
    config(**qwen, use_sliding_window=True, max_window_layers=2)  # windows begin above the last layer
    config(**qwen, use_sliding_window=True, layer_types=["full_attention", "full_attention"])
    with pytest.raises(UserError, match="sliding_window"):
        config(**qwen, use_sliding_window=True, max_window_layers=1)
