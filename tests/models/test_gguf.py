"""GGUF files of every architecture, written here from transformers models."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import UserError
from common.models import load_model
from common.models.config import ModelConfig
from common.models.layers import inverse_frequencies
from common.models.rope import Llama3Scaling
from tests.helpers import all_logits
from tests.models import fuzz, fuzz_gguf, gguf_writer, reference
from tests.models.tokenizer_cases import sentencepiece_metadata

TOKENS = [(5 * i * i + 1) % 97 for i in range(100)]
PLAIN = "llama, 3 queries a KV head"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", [case for case in reference.CASES if "stretched" not in case])
def test_round_trip(case: str, path: Path) -> None:
    theirs = reference.make(case)
    gguf_writer.write(theirs, path)
    ours = load_model(str(path))
    assert ours.config.eos_token_ids == (2, 5)
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    reference.assert_close(all_logits(ours, TOKENS), reference.logits(theirs, TOKENS))


def test_llama3_rope_factors(path: Path) -> None:
    rope = reference.LLAMA3_ROPE | {"original_max_position_embeddings": 8192, "factor": 32.0}
    theirs = reference.make("llama, stretched rope", rope_parameters=rope, max_position_embeddings=12000)
    config = ModelConfig.from_hf("m", theirs.config.to_dict())
    plain = ModelConfig.from_hf("m", theirs.config.to_dict() | {"rope_parameters": {"rope_theta": 500000.0}})
    factors = inverse_frequencies(plain) / inverse_frequencies(config)
    assert factors.max() > 30
    assert factors.min() == 1
    gguf_writer.write(theirs, path, rope_factors=factors.numpy())
    ours = load_model(str(path))
    assert ours.config.rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    reference.assert_close(all_logits(ours, TOKENS), reference.logits(theirs, TOKENS))


def test_other_rope_factors_are_refused(path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, rope_factors=np.array([1.0, 2.0, 3.0, 4.0]))
    assert "rope_freqs" in refusal(path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_dequantised_as_the_library_does(kind: str, path: Path) -> None:
    import gguf

    theirs = reference.make(PLAIN, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    gguf_writer.write(theirs, path, quantize=kind)
    quantisation = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                stored = gguf.quantize(parameter.numpy(), quantisation)
                parameter.copy_(torch.from_numpy(gguf.dequantize(stored, quantisation).copy()))
    reference.assert_close(all_logits(load_model(str(path)), TOKENS), reference.logits(theirs, TOKENS))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"general.architecture": "gemma"}, "'gemma'"),
        ({"llama.expert_count": 8}, "llama.expert_count 8"),
        ({"llama.attention.sliding_window": 128}, "attention.sliding_window 128"),
        ({"llama.attention.causal": False}, "attention.causal False"),
        ({"llama.attention.scale": 0.5}, "attention.scale"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.something_new": 0}, "llama.something_new 0"),
        ({"llama.rope.something_new": "x"}, "rope.something_new"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4"),
        ({"llama.attention.value_length": 4}, "value_length 4"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "head_count_kv differs"),
        ({"llama.vocab_size": 96}, "vocab_size is 96"),
        ({"split.count": 3}, "several parts"),
        ({"llama.attention.key_length": 16}, "attn_q.weight|q_proj.weight has shape"),
    ],
)
def test_refused_by_name(extra: dict[str, Any], named: str, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, extra=extra)
    assert any(part in refusal(path) for part in named.split("|"))


def test_keys_that_change_nothing_are_accepted(path: Path) -> None:
    values = {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, "attention.sliding_window": 0}
    values |= {"vocab_size": 97, "rope.dimension_count": 8, "tensor_data_layout": "Meta AI original pth"}
    values |= {"attention.head_count_kv": [2, 2, 2], "feed_forward_length": [80, 80, 80]}
    theirs = reference.make(PLAIN)
    gguf_writer.write(theirs, path, extra={f"llama.{key}": value for key, value in values.items()})
    reference.assert_close(all_logits(load_model(str(path)), TOKENS), reference.logits(theirs, TOKENS))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 8.0}),
        ({"rope_type": "default"}, {"scaling.type": "linear", "scaling.factor": 1.0, "scaling.finetuned": True}),
        ({"rope_type": "default"}, {"scaling.factor": 0.0, "scaling.original_context_length": 64}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.5}, {"scale_linear": 2.5}),
        (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
            {
                **{"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64},
                **{"scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0, "scaling.yarn_attn_factor": 1.5},
                **{"scaling.yarn_ext_factor": 1.0, "scaling.yarn_log_multiplier": 0.0, "scaling.attn_factor": 1.0},
            },
        ),
    ],
)
def test_rope_scaling_is_applied(rope: dict[str, Any], scaling: dict[str, Any], path: Path) -> None:
    theirs = reference.make(PLAIN, rope_parameters={"rope_theta": 10000.0, **rope})
    gguf_writer.write(theirs, path, extra={f"llama.rope.{key}": value for key, value in scaling.items()})
    reference.assert_close(all_logits(load_model(str(path)), TOKENS), reference.logits(theirs, TOKENS))


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"scaling.type": "longrope", "scaling.factor": 4.0}, "type 'longrope'"),
        ({"scaling.type": "Yarn"}, "type 'Yarn'"),
        ({"scaling.factor": -4.0}, "factor of type 'linear' must be a number above 0"),
        ({"scaling.factor": float("nan")}, "scaling.factor"),
        ({"scaling.factor": "4"}, "scaling.factor must be float, not '4'"),
        ({"scaling.factor": 4.0, "scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor"),
        ({"scaling.factor": 4.0, "scaling.attn_factor": 1.2}, "attn_factor"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"scaling.alpha": 1000.0}, "alpha"),
        ({"freq_base_swa": 1e4}, "freq_base_swa"),
        ({"dimension_sections": [1, 1, 1, 1]}, "dimension_sections"),
    ],
)
def test_rope_scaling_that_is_not_supported_is_refused_by_name(scaling: dict[str, Any], named: str, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, extra={f"llama.rope.{key}": value for key, value in scaling.items()})
    assert named in refusal(path)


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "blk.0.attn_qkv.weight", "blk.0.attn_sinks", "x"])
def test_a_tensor_of_another_model_is_refused_by_name(name: str, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, tensors={name: np.ones(4, np.float32)})
    assert f"tensor {name} is not supported" in refusal(path)


def test_missing_metadata_is_refused(path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, drop=["llama.feed_forward_length"])
    assert "lacks llama.feed_forward_length" in refusal(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 a zip file")
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"")
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    assert "big-endian" in refusal(path)
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    assert "version 1" in refusal(path)


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path)
    data = path.read_bytes()
    path.write_bytes(data[: max(4, int(len(data) * share))])
    assert "truncated or damaged" in refusal(path)


def test_numbers_that_a_file_only_claims(path: Path) -> None:
    """Refused before anything of their size is made: see `fuzz.py` for the limits."""
    gguf_writer.write(reference.make(PLAIN), path)
    values, tensors, data = fuzz_gguf.decode(path)
    claimed: list[tuple[str, fuzz_gguf.Value]] = [
        ("x", fuzz_gguf.Value(fuzz_gguf.ARRAY, [], inner, claims))
        for inner in (0, fuzz_gguf.STRING, fuzz_gguf.ARRAY, 12)
        for claims in (2**60, 2**31, 2**64 - 1)
    ]
    huge = [
        ("block_count", 10**9),
        ("embedding_length", 10**12),
        ("attention.key_length", 10**12),
        ("vocab_size", 10**12),
    ]
    claimed += [(f"llama.{key}", fuzz_gguf.Value(10, number)) for key, number in huge]
    claimed += [("general.alignment", fuzz_gguf.Value(4, number)) for number in (0, 3, 2**31)]
    for key, value in claimed:
        changed = [(k, v) for k, v in values if k != key]
        path.write_bytes(fuzz_gguf.encode([*changed, (key, value)], tensors, data)[0])
        before, start = fuzz.peak(), time.process_time()
        refusal(path)
        assert time.process_time() - start < 2, key
        assert fuzz.peak() - before < 64 << 20, key
    name, dimensions, kind, offset = tensors[-1]
    for changed_tensor in ((name, [2**40, *dimensions[1:]], kind, offset), (name, dimensions, kind, 2**63)):
        path.write_bytes(fuzz_gguf.encode(values, [*tensors[:-1], changed_tensor], data)[0])
        assert name in refusal(path)


def test_deep_nesting_is_refused(path: Path) -> None:
    """Arrays of arrays, 200,000 deep."""
    nested = struct.pack("<IQ", 9, 1) * 200_000
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fuzz_gguf.encode_text("x") + struct.pack("<I", 9)
    path.write_bytes(header + nested)
    assert "truncated or damaged" in refusal(path)


def test_mutated_files_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    """200 of those that `python -m tests.models.fuzz` makes."""
    tally = fuzz.fuzz(fuzz_gguf.GGUFFiles(), 200, 2, tmp_path)
    assert not tally.wrong, tally.wrong[0]
    assert set(tally.outcomes) == {"loads", "refused"}
    assert tally.outcomes["loads"] >= 10


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"scaling.factor": 4.0},
        {"scaling.type": "none", "scaling.factor": 4.0},
        {"scaling.type": "yarn", "scaling.factor": 4.0},
    ],
)
@pytest.mark.parametrize("case", [PLAIN, "qwen2"])
def test_logits_are_those_of_llama_cpp(case: str, scaling: dict[str, Any], path: Path) -> None:
    """Where llama-cpp-python is installed: also what a key means that is missing."""
    llama_cpp = pytest.importorskip("llama_cpp")
    metadata = sentencepiece_metadata()
    theirs = reference.make(case, vocab_size=len(metadata["tokenizer.ggml.tokens"]), hidden_size=48)
    rope = {f"{theirs.config.model_type}.rope.{key}": value for key, value in scaling.items()}
    gguf_writer.write(theirs, path, extra=metadata | rope)
    model = llama_cpp.Llama(str(path), n_ctx=256, n_gpu_layers=0, logits_all=True, type_k=0, type_v=0, verbose=False)
    model.eval(TOKENS)
    expected = torch.from_numpy(np.array(model.scores[: len(TOKENS)]))
    reference.assert_close(all_logits(load_model(str(path)), TOKENS), expected)
