"""From named tensors, in Hugging Face's naming, to a `Decoder`, whatever the tensors come from."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import torch

from common.errors import require
from common.execution.choose import choose_linear
from common.models.config import ModelConfig
from common.models.decoder import Decoder, DecoderLayer
from common.models.layers import RMSNorm
from common.models.linear import Projection
from common.text.tokenizer import Tokenizer
from common.watch.peak_memory import require_memory
from common.watch.progress import progress_bar, say_once

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

PARTS = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")  # What a decoder is made of

Shape = tuple[int, ...]
Part = tuple[slice, ...]  # of a weight [out, in]: of its outputs, or of all outputs and of its inputs; () is all of it
Load = Callable[[Iterable[str]], torch.Tensor]
MakeProjection = Callable[[list[str], bool], Projection]
"""(names, bias): from layers of one input, `model.layers.0.self_attn.q_proj` ..., to one with all outputs."""


class ModelSource(Protocol):
    """Where a model comes from."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        """One tensor of that shape, or a part of it, in any floating dtype, on any device."""
        ...

    def tokenizer(self) -> Tokenizer | None: ...


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint."""
    hidden, d = config.hidden_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (d,) for name in "qk"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (config.intermediate_size, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, config.intermediate_size)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def check_tensors(config: ModelConfig, found: dict[str, Shape]) -> None:
    """`UserError` unless a file's tensors are those of the model that its configuration describes.

    Tensors of parts that this decoder does not have (a classifier's `score.weight`, `v_head`, a vision tower) are named
    in a line and left out, as transformers does. Those of parts that it has (a bias, a layer after the last) are
    refused, where transformers ignores them: the configuration says something else than the weights.
    """
    too_few = f"{config.num_layers} layers (num_layers) do not lie in {len(found)} tensors: it is damaged"
    require(config.num_layers <= len(found), f"{config.name}: {too_few}")
    wanted = tensor_shapes(config)
    if HEAD in found:  # also where it should be tied
        wanted[HEAD] = (config.vocab_size, config.hidden_size)
    extra = [name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    unused = [name for name in extra if not name.startswith(PARTS)]
    hint = f"it does not belong to this {config.architecture} configuration, or is incomplete"
    missing, unexpected = [name for name in wanted if name not in found], [n for n in extra if n.startswith(PARTS)]
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        require(not names, f"{config.name}: the checkpoint {kind} tensors {_some(names)}: {hint}")
    for name, shape in wanted.items():
        shapes = f"has shape {list(found[name])}, but the configuration says {list(shape)}"
        require(found[name] == shape, f"{config.name}: tensor {name} {shapes}")
    if unused:
        say_once(f"{config.name}: its tensors {_some(unused)} are not used")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(" ".join(name[:80].split()) for name in names[:3]) + more


def build_decoder(
    source: ModelSource, dtype: torch.dtype, device: torch.device, progress: bool | None,
    make_projection: MakeProjection | None = None,
) -> Decoder:  # fmt: skip
    """Read tensor after tensor straight into its place, so that the model is in memory once.
    make_projection: makes the layers' projections; None reads their weights and leaves them as they are."""
    config = source.config
    shapes = tensor_shapes(config)
    held = [shape for name, shape in shapes.items() if make_projection is None or not name.endswith("_proj.weight")]
    require_memory(f"{config.name}: its weights", sum(map(math.prod, held)) * dtype.itemsize, device)
    with progress_bar(f"loading {config.name}", len(shapes), show=progress) as advance:
        load = loader(source, dtype, device, advance)
        make = make_projection or partial(plain_projection, loader(source, dtype, device))

        def project(names: list[str], bias: bool) -> Projection:
            advance(len(names) * (1 + bias))
            return make(names, bias)

        embedding = load([EMBEDDING])
        layers = [build_layer(config, i, load, project) for i in range(config.num_layers)]
        norm = RMSNorm(load(["model.norm.weight"]), config.rms_norm_eps)
        head = choose_linear(embedding if config.tie_word_embeddings else load([HEAD]))
    return Decoder(config, embedding, layers, norm, head)


def loader(
    source: ModelSource, dtype: torch.dtype, device: torch.device, advance: Callable[[int], None] = lambda amount: None
) -> Load:
    """A function that reads the named tensors, below one another in one tensor; `advance(1)` after each."""
    shapes = tensor_shapes(source.config)

    def load(names: Iterable[str]) -> torch.Tensor:
        wanted = list(names)
        rows = [shapes[name][0] for name in wanted]
        result = torch.empty(sum(rows), *shapes[wanted[0]][1:], dtype=dtype, device=device)
        for name, part in zip(wanted, result.split(rows), strict=True):
            part.copy_(source.read(name, shapes[name]))
            advance(1)
        return result

    return load


def plain_projection(load: Load, names: list[str], bias: bool) -> Projection:
    """The layers of these names as one, their weights as `load` reads them."""
    weight = load(f"{name}.weight" for name in names)
    return choose_linear(weight, load(f"{name}.bias" for name in names) if bias else None)


def build_layer(config: ModelConfig, index: int, load: Load, project: MakeProjection | None = None) -> DecoderLayer:
    """One decoder layer, its norms read by `load`, its projections made by `project` or read as well."""
    at, make = f"model.layers.{index}", project or partial(plain_projection, load)

    def linear(*names: str, bias: bool = False) -> Projection:
        return make([f"{at}.{name}" for name in names], bias)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(load([f"{at}.{name}.weight"]), config.rms_norm_eps)

    return DecoderLayer(
        index=index,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        input_norm=norm("input_layernorm"),
        qkv_proj=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=config.qkv_bias),
        o_proj=linear("self_attn.o_proj"),
        post_attention_norm=norm("post_attention_layernorm"),
        gate_up_proj=linear("mlp.gate_proj", "mlp.up_proj"),
        down_proj=linear("mlp.down_proj"),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
    )
