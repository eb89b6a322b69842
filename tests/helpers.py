"""What tests of several folders share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.models import Decoder
from common.models.linear import Linear
from common.models.load import open_source
from common.models.weights import ModelSource, Shape, build_decoder, tensor_shapes
from common.text.tokenizer import Tokenizer
from stages.m7_gptq.checkpoint.baselines import ROUNDED, round_to_nearest
from tests.depth import DEEP


def every_pair(one: Sequence[Any], two: Sequence[Any], three: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Any value of one list meets any of another in one of these; any three meet only in the deep run."""
    assert len(three) <= min(len(one), len(two))
    grid = product(enumerate(one), enumerate(two), enumerate(three))
    return [(a, b, c) for (i, a), (j, b), (k, c) in grid if DEEP or (i + j + k) % len(three) == 0]


def run_in_numbas_own_pool(script: str) -> str:
    """What a script prints, with two threads of `workqueue`, which Numba has without OpenMP and TBB: it kills the
    process where two enter it at once."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    here = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


def full_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An `attend` for one whole sequence: causal, without a cache, by PyTorch's own attention."""
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    output = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return output[0].transpose(0, 1)


@torch.inference_mode()
def all_logits(model: Decoder, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, vocab] of one sequence, all positions at once."""
    ids = torch.tensor(token_ids, device=model.device)
    return model.logits(model(ids, torch.arange(len(token_ids), device=model.device), full_attention))


def greedy(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens, the whole sequence computed again for each."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(all_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def freeze(model: str, folder: Path) -> str:
    """Write a random model as a Hugging Face folder: the same weights, in whatever order they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(model)
    tensors = {name: source.read(name, shape) for name, shape in tensor_shapes(source.config).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source.config.to_hf()[0]))
    return str(folder)


class _Rounded:
    """A model whose projections are rounded as m7 rounds random ones, and dequantised."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.config = source.config

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        tensor = self.source.read(name, shape)
        return round_to_nearest(tensor, ROUNDED).dequantize() if name.endswith("_proj.weight") else tensor

    def tokenizer(self) -> Tokenizer | None:
        return self.source.tokenizer()


@torch.inference_mode()
def rounded(model: str) -> Decoder:
    """A random model with plain float32 weights that equal those of m7's engine."""
    decoder = build_decoder(_Rounded(open_source(model)), torch.float32, torch.device("cpu"), False)
    decoder.head = exact_eight_bit_head(decoder)
    return decoder


def exact_eight_bit_head(model: Decoder) -> Linear:
    """The head whose weights are those that m7's 8-bit head stands for, in float32; the model's is a `Linear`."""
    weight = cast(Linear, model.head).weight.float()
    scales = weight.abs().amax(1, keepdim=True) / 127
    return Linear((weight / scales).round() * scales)
