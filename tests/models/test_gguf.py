"""GGUF files of every architecture, written here from transformers models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import UserError
from common.models import load_model, load_tokenizer
from common.models.config import ModelConfig
from common.models.layers import inverse_frequencies
from common.models.rope import Llama3Scaling
from tests.helpers import all_logits
from tests.models import gguf_writer, reference

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
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.attention.sliding_window": 128}, "sliding-window"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count"),
        ({"split.count": 3}, "several parts"),
        ({"llama.attention.key_length": 16}, "attn_q.weight|q_proj.weight has shape"),
    ],
)
def test_refused_by_name(extra: dict[str, Any], named: str, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, extra=extra)
    assert any(part in refusal(path) for part in named.split("|"))


def test_missing_metadata_is_refused(path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path, drop=["llama.feed_forward_length"])
    assert "lacks llama.feed_forward_length" in refusal(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 a zip file")
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"")
    assert "not a GGUF file" in refusal(path)


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path)
    data = path.read_bytes()
    path.write_bytes(data[: max(4, int(len(data) * share))])
    assert "truncated or damaged" in refusal(path)


# -- tokenizers -----------------------------------------------------------------------------------------------------


def byte_level_metadata(pre: str, **more: Any) -> dict[str, Any]:
    """A tokenizer of all bytes, a few merges and two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "12", "123", "Ġhe", "<|start|>", "<tool>"]
    types = [3] + [1] * (len(tokens) - 3) + [3, 4]
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": ["h e", "l l", "1 2", "12 3", "Ġ he"],
        "eos_token_id": 0,
        "bos_token_id": len(tokens) - 2,
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def write_with_tokenizer(path: Path, metadata: dict[str, Any]) -> None:
    gguf_writer.write(reference.make(PLAIN, vocab_size=len(metadata["tokenizer.ggml.tokens"])), path, extra=metadata)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["he", "ll", "o", "Ġ", "1", "2", "3"]),
        ("qwen2", ["he", "ll", "o", "Ġ", "1", "2", "3"]),
        ("gpt-2", ["he", "ll", "o", "Ġ", "123"]),
        ("llama-bpe", ["<|start|>", "he", "ll", "o", "Ġ", "123"]),
    ],
)
def test_numbers_are_cut_as_the_pre_tokenizer_says(pre: str, pieces: list[str], path: Path) -> None:
    write_with_tokenizer(path, byte_level_metadata(pre))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer is not None
    token_ids = tokenizer.encode("hello 123")
    assert [tokenizer.backend.id_to_token(t) for t in token_ids] == pieces
    assert tokenizer.decode(token_ids) == "hello 123"
    assert tokenizer.eos_token_ids == (0, 5)


def test_special_and_added_tokens_are_kept_whole(path: Path) -> None:
    write_with_tokenizer(path, byte_level_metadata("qwen2"))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer is not None
    token_ids = tokenizer.encode("<|start|><tool>he<|end|>")
    assert len(token_ids) == 4
    assert tokenizer.decode(token_ids) == "<tool>he"  # a tool call is text, a control token is not


@pytest.mark.parametrize("metadata", [{"pre": "falcon"}, {"model": "llama", "pre": "default"}])
def test_a_tokenizer_of_another_kind_leaves_token_ids(metadata: dict[str, str], path: Path) -> None:
    write_with_tokenizer(path, byte_level_metadata("") | {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.warns(UserWarning, match="prompts must be token ids"):
        assert load_tokenizer(str(path)) is None
    assert all_logits(load_model(str(path)), [1, 2]).isfinite().all()


def test_a_file_without_a_tokenizer_gives_none_and_no_warning(path: Path) -> None:
    gguf_writer.write(reference.make(PLAIN), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(str(path)) is None
