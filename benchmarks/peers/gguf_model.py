"""The GGUF file that llama.cpp runs: the model's own, or one that is made of it once and kept in the cache."""

import ctypes
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch

from benchmarks.contestant import Setting
from benchmarks.files import write_atomically
from benchmarks.peers.hf_model import our_tensors
from common.config import DEFAULT_MODEL
from common.errors import require
from common.execution.cache import cache_root
from common.models.layers import inverse_frequencies
from common.models.sources.embedded import find_gguf
from common.models.sources.gguf_reader import read_header
from common.models.sources.random_weights import PREFIX
from common.watch.progress import say


def gguf_of(setting: Setting, kind: str) -> tuple[Path, str]:
    """A file of the model in the format `kind` (`Q4_0`, ...), and what it is, for the row's note; `UserError` for a
    model that is no GGUF file and no random weights."""
    model, wanted = setting.model, gguf.LlamaFileType[f"MOSTLY_{kind}"].value
    path = find_gguf() if model == DEFAULT_MODEL else Path(model).expanduser()
    if model.startswith(PREFIX):
        name = f"{model.replace(':', '-')}-{setting.device.type}-seed{setting.options.get('seed', 0)}"
        path = _cached(name, f"writing {model}", lambda scratch: write_gguf(setting, scratch))
    known = path.suffix.lower() == ".gguf" and path.is_file()
    other = f"choose {DEFAULT_MODEL}, {PREFIX}<preset> or a *.gguf file"
    require(known, f"llama.cpp runs GGUF files only, and {model} is none: {other}")
    made = f"runs {path.name}"
    if read_header(path)[0].get("general.file_type") != wanted:
        made, stat = f"runs {kind}, made of {path.name} by llama.cpp's own quantiser", path.stat()
        stamp = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
        what, source = f"quantising {path.name} to {kind}", path
        path = _cached(f"{path.stem}-{stamp}-{kind}", what, lambda scratch: _quantize(source, scratch, wanted))
    tensors = read_header(path)[1]
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    return path, f"{made}, output head in {head.kind.name}"


def _cached(name: str, what: str, write: Any) -> Path:
    path = cache_root() / "llama.cpp" / f"{name}.gguf"
    if not path.exists():
        say(f"llama.cpp: {what}, once: it will be kept in {path}")
        write_atomically(path, write)
    return path


def _quantize(source: Path, target: Path, file_type: int) -> None:
    """From any format to any other: what is quantised already is dequantised first."""
    import llama_cpp  # not needed to write a file

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, torch.get_num_threads()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    room = "free some space, or set FOLOVLLM_CACHE to another folder"
    require(status == 0, f"llama.cpp cannot write {source.name} in another format to {target.parent}: {room}")


def write_gguf(setting: Setting, path: Path) -> None:
    """Our weights without a tokenizer: matrices in bfloat16, the rest in float32, as llama.cpp wants them."""
    source, tensors = our_tensors(replace(setting, dtype=torch.bfloat16))
    config = source.config
    writer: Any = gguf.GGUFWriter(path, config.architecture)
    values = {
        **{"file_type": gguf.LlamaFileType.MOSTLY_BF16, "tokenizer_model": "none", "vocab_size": config.vocab_size},
        **{"context_length": config.max_position_embeddings, "embedding_length": config.hidden_size},
        **{"feed_forward_length": config.intermediate_size, "block_count": config.num_layers},
        **{"head_count": config.num_heads, "head_count_kv": config.num_kv_heads, "rope_freq_base": config.rope_theta},
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), config.head_dim),
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if config.architecture == "llama" else {}
    for name, tensor in tensors.items():
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbours: rows 0, D/2, 1, D/2 + 1, ...
            tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.BF16 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        array = gguf.quantize(tensor.float().cpu().contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)
    if config.rope_scaling:
        divisors = inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
