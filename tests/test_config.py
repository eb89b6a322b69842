"""Options: whatever is misspelt or impossible is refused at the door, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import common
from common import EngineConfig, SamplingParams, UserError
from common.config import parse_device


def test_public_names_import_from_common() -> None:
    for name in ("Engine", "EngineConfig", "SamplingParams", "RequestOutput", "CompletionOutput", "UserError"):
        assert name in common.__all__ and hasattr(common, name)


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    """Must not be dropped silently."""
    with pytest.raises(UserError, match=r"max_num_seq'.*mean 'max_num_seqs'.*Choose from: .*model.*dtype.*seed"):
        EngineConfig(max_num_seq=4)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"temprature'.*mean 'temperature'.*Choose from: .*max_tokens.*logprobs"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["float32", "fp32", torch.float32])
def test_float32_spellings(name: Any) -> None:
    assert EngineConfig(dtype=name).torch_dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float16", torch.float16)],
)
def test_half_precision_spellings(name: str, dtype: torch.dtype) -> None:
    assert EngineConfig(dtype=name).torch_dtype is dtype


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"dtype": torch.int8},
        {"dtype": None},
        {"device": "gpu"},
        {"device": "meta"},
        {"device": "cuda:99"},
        {"model": ""},
        {"model": Path("somewhere")},
        {"max_model_len": 0},
        {"max_model_len": 1.5},
        {"max_num_seqs": 0},
        {"max_num_seqs": True},
        {"max_num_seqs": None},
        {"kv_cache_memory": "1 GB"},
        {"kv_cache_memory": -1},
        {"seed": -2},
        {"seed": 2**63},
        {"seed": None},
        {"fused_kernels": 1},
        {"head_bits": 3},
        {"head_bits": "8"},
        {"head_bits": 8.0},
        {"head_bits": None},
        {"linear_backend": "triton"},
    ],
)
def test_impossible_engine_options_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        EngineConfig(**options)
    assert "\n" not in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_auto_is_a_device_that_exists() -> None:
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.0},
        {"max_tokens": True},
        {"max_tokens": None},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_p": -0.1},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": 5},
        {"stop": None},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [1.0]},
        {"stop_token_ids": 7},
        {"stop": "a\ud800"},
        {"top_k": np.array([3])},
        {"top_k": np.float32(1.5)},
        {"stop_token_ids": np.array([[1]])},
        {"seed": -2},
        {"seed": 2**63},
        {"seed": 1.5},
        {"seed": "x"},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": 2.5},
        {"logprobs": True},
    ],
)
def test_impossible_sampling_values_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**options)
    assert "\n" not in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_the_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        max_tokens=1, min_tokens=1, temperature=0.0, top_p=1.0, min_p=1.0, seed=2**63 - 1, logprobs=20, stop="END"
    )
    assert params.greedy and params.stop_strings == ("END",)


def test_numbers_that_mean_all_and_any() -> None:
    params = SamplingParams(top_k=-1, seed=-1, top_p=0, temperature=1.0)
    assert (params.top_k, params.seed, params.greedy) == (0, None, True)
    assert EngineConfig(seed=-1).seed != EngineConfig(seed=-1).seed


def test_numbers_of_numpy_and_pytorch_are_numbers() -> None:
    params = SamplingParams(
        max_tokens=np.int64(7), temperature=np.float32(0.5), top_k=torch.tensor(3), seed=np.uint8(9),
        logprobs=np.int32(1), ignore_eos=np.bool_(True), stop_token_ids=np.array([4, 5]), top_p=np.float64(0.25),
    )  # fmt: skip
    same = SamplingParams(
        max_tokens=7, temperature=0.5, top_k=3, seed=9, logprobs=1, ignore_eos=True, stop_token_ids=(4, 5), top_p=0.25
    )
    assert params == same and type(params.max_tokens) is int and type(params.ignore_eos) is bool
    assert SamplingParams(stop_token_ids=[np.int64(4), torch.tensor(5)]).stop_token_ids == (4, 5)
    assert type(EngineConfig(max_num_seqs=np.int64(4)).max_num_seqs) is int
