"""The GGUF file that llama.cpp runs: the model's own, or one that is made of it once and kept in the cache."""

import ctypes
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch

from benchmarks.contestant import Setting
from benchmarks.files import write_atomically
from benchmarks.peers.hf_model import our_tensors
from common.config import DEFAULT_MODEL
from common.errors import UserError, require
from common.execution.cache import cache_root
from common.models.layers import inverse_frequencies
from common.models.sources.embedded import find_gguf
from common.models.sources.gguf_reader import read_header
from common.models.sources.random_weights import PREFIX
from common.watch.progress import say


def gguf_of(setting: Setting, kind: str) -> tuple[Path, str]:
    """A file of the model in the format `kind` (`Q4_0`, ...), and what it is, for the row's note."""
    path = _original(setting)
    wanted = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    made = f"runs {path.name}"
    if read_header(path)[0].get("general.file_type") != wanted:
        stamp = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        of, path = path, _cached(f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}-{kind}")
        made = f"runs {kind}, made of {of.name} by llama.cpp's own quantiser"
        if not path.exists():
            say(f"llama.cpp: quantising {of.name} to {kind}, once: it will be kept in {path}")
            write_atomically(path, lambda scratch: _quantize(of, scratch, wanted))
    tensors = read_header(path)[1]
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    return path, f"{made}, output head in {head.kind.name}"


def _original(setting: Setting) -> Path:
    """What the formats are made of; `UserError` for models that come in another form."""
    model = setting.model
    if model == DEFAULT_MODEL:
        return find_gguf()
    if model.lower().endswith(".gguf") and Path(model).expanduser().is_file():
        return Path(model).expanduser()
    formats = f"choose {DEFAULT_MODEL}, {PREFIX}<preset> or a *.gguf file"
    require(model.startswith(PREFIX), f"llama.cpp runs GGUF files only, and {model} is none: {formats}")
    path = _cached(f"{model.replace(':', '-')}-{setting.device.type}-seed{setting.options.get('seed', 0)}")
    if not path.exists():
        say(f"llama.cpp: writing {model} as a GGUF file, once: it will be kept in {path}")
        write_atomically(path, lambda scratch: write_gguf(replace(setting, dtype=torch.bfloat16), scratch))
    return path


def _cached(name: str) -> Path:
    return cache_root() / "llama.cpp" / f"{name}.gguf"


def _quantize(source: Path, target: Path, file_type: int) -> None:
    """From any format to any other: what is quantised already is dequantised first."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, torch.get_num_threads()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        room = "free some space, or set FOLOVLLM_CACHE to another folder"
        raise UserError(f"llama.cpp cannot write {source.name} in another format to {target.parent}: {room}")


def write_gguf(setting: Setting, path: Path) -> None:
    """Our weights without a tokenizer: matrices in bfloat16, the rest in float32, as llama.cpp wants them."""
    source, tensors = our_tensors(setting)
    config = source.config
    writer: Any = gguf.GGUFWriter(path, config.architecture)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for add, value in (
        (writer.add_vocab_size, config.vocab_size), (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size), (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_block_count, config.num_layers), (writer.add_head_count, config.num_heads),
        (writer.add_head_count_kv, config.num_kv_heads), (writer.add_key_length, config.head_dim),
        (writer.add_value_length, config.head_dim), (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_rope_freq_base, config.rope_theta),
    ):  # fmt: skip
        add(value)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if config.architecture == "llama" else {}
    for name, tensor in tensors.items():
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbours: rows 0, D/2, 1, D/2 + 1, ...
            tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.BF16 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quantize(tensor.float().cpu().contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=kind)
    if config.rope_scaling:
        divisors = inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
