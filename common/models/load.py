"""From a model's name to the model and its tokenizer, and what all stages load alike."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import DEFAULT_MODEL, EngineConfig, parse_device, parse_dtype
from common.errors import UserError, refusing, require
from common.execution.choose import choose_ops
from common.execution.parallel.decoder import SplitDecoder
from common.execution.parallel.split import SplitSource
from common.models.decoder import Decoder
from common.models.layers import RotaryEmbedding
from common.models.sources.embedded import open_embedded
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.hf_folder import HFFolder
from common.models.sources.hub import fetch, is_hub_id
from common.models.sources.nf4_folder import NF4Folder, is_bitsandbytes_folder
from common.models.sources.quantized_folder import quantization
from common.models.sources.random_weights import PREFIX, PRESETS, RandomSource
from common.models.weights import ModelSource, build_decoder
from common.text.chat_template import template_kwargs
from common.text.tokenizer import Tokenizer
from common.watch.peak_memory import require_memory
from common.watch.progress import say_once

LARGEST_TABLE = 1 << 30  # Bytes that a model's positions may take: about a million of them
LONGEST = 1 << 17  # Positions of a request unless asked for more


@dataclass(frozen=True)
class Loaded:
    model: Decoder
    tokenizer: Tokenizer | None
    max_model_len: int


def load_for(config: EngineConfig, fused: bool = False) -> Loaded:
    """What `config.model` names, fused: with fused kernels where they run; `UserError` for what it cannot do."""
    place, dtype = config.torch_device, config.torch_dtype
    source = own_part(open_source(config.model, place, config.seed, progress=None), config)
    tokenizer = read_tokenizer(source, config.chat_template)  # first: it is refused sooner than weights are read
    return prepare(read_decoder(source, dtype, place, progress=None), tokenizer, config, fused)


def own_part(source: ModelSource, config: EngineConfig) -> ModelSource:
    """Of several ranks, what this one holds."""
    return source if config.ranks is None else SplitSource(source, config.ranks.split)


def prepare(model: Decoder, tokenizer: Tokenizer | None, config: EngineConfig, fused: bool) -> Loaded:
    """A model that is loaded already, with its kernels chosen and its limit checked."""
    alone = "tensor_parallel_size: build the engine by stages.build, which starts the ranks"
    require(config.ranks is not None or config.tensor_parallel_size == 1, alone)
    if config.ranks is not None:
        model = SplitDecoder(model, config.ranks)
    model.ops = choose_ops(model.device, fused)
    name, limit = model.config.name, model.config.max_position_embeddings
    if tokenizer is not None:
        tokenizer.template_kwargs = template_kwargs(config.chat_template_kwargs)
    length = config.max_model_len or min(limit, LONGEST)
    require(length <= limit, f"max_model_len={length} is over the model's limit of {limit} positions: lower it")
    size = 2 * model.config.head_dim * model.dtype.itemsize
    claim = f"{name} claims {limit:,} positions, a table of {limit * size:,} bytes: pass max_model_len"
    require(config.max_model_len is not None or limit * size <= LARGEST_TABLE, claim)
    if config.max_model_len is None and length < limit:
        say_once(f"{name} has {limit:,} positions, and requests may have {length:,}: pass max_model_len for more")
    require_memory(f"a table of {length:,} positions", length * size, model.device, "lower max_model_len")
    with refusing(name):
        model.rotary = RotaryEmbedding(model.config, model.dtype, model.device, length)
    return Loaded(model, tokenizer, length)


def load_model(
    name: str, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu", seed: int = 0,
    progress: bool | None = False,
) -> Decoder:  # fmt: skip
    """The decoder of that name (see `open_source`), its weights on `device` in `dtype`.
    seed: of random weights. progress: None draws a bar on a terminal. `UserError` for what cannot be loaded."""
    place = parse_device(device)
    return read_decoder(open_source(name, place, seed, progress), parse_dtype(dtype), place, progress)


def read_decoder(source: ModelSource, dtype: torch.dtype, device: torch.device, progress: bool | None) -> Decoder:
    with refusing(source.config.name), torch.inference_mode():
        decoder = build_decoder(source, dtype, device, progress)
    decoder.note = getattr(source, "note", None)  # of a `QuantizedFolder`
    return decoder


def load_tokenizer(name: str, chat_template: str | None = None) -> Tokenizer | None:
    """The tokenizer of the model of that name; None where it has none. chat_template: see `EngineConfig`."""
    return read_tokenizer(open_source(name), chat_template)


def read_tokenizer(source: ModelSource, chat_template: str | None) -> Tokenizer | None:
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.use_template(chat_template, {})
    return tokenizer


def open_source(
    name: str, device: torch.device | None = None, seed: int = 0, progress: bool | None = False
) -> ModelSource:
    """`smollm2-135m-instruct`; `random:<preset>`; a *.gguf file; a Hugging Face folder; a hub id `Org/Name`.
    A folder in GPTQ's format, or in NF4, gives its dequantised weights."""
    with refusing(name):
        return _open_source(name, device, seed, progress)


def _open_source(name: str, device: torch.device | None, seed: int, progress: bool | None) -> ModelSource:
    if name == DEFAULT_MODEL:
        return open_embedded(progress)
    if name.startswith(PREFIX):
        return RandomSource(name, device or torch.device("cpu"), seed)
    folder = find_folder(name)
    if folder is not None:
        label = name if is_hub_id(name) else None
        source = open_quantized_folder(folder, label) if quantization(folder) else HFFolder(folder, label)
        source.check()  # its configuration holds from here on
        return source
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        require(path.is_file(), f"there is no file {name}")
        from common.models.sources.gguf_file import GGUFFile

        return GGUFFile(path)
    require(not path.is_file(), f"{name} is a file, but no *.gguf: give the Hugging Face folder that it lies in")
    presets = ", ".join(PREFIX + preset for preset in PRESETS)
    raise UserError(
        f"unknown model {name!r}. Choose from: {DEFAULT_MODEL}, {presets}, a Hugging Face folder, a *.gguf file, "
        "or a hub id such as Qwen/Qwen3-0.6B"
    )


def open_quantized_folder(folder: Path, name: str | None = None) -> GPTQFolder | NF4Folder:
    """A quantised model's folder, in the format that it says."""
    return NF4Folder(folder, name) if is_bitsandbytes_folder(folder) else GPTQFolder(folder, name)


def find_folder(name: str) -> Path | None:
    """The folder of a model that has one, here or, where no file has that name, on the hub: it is then downloaded."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        return fetch(name) if is_hub_id(name) and path.suffix.lower() != ".gguf" and not path.is_file() else None
    except (OSError, RuntimeError) as error:  # a name too long for any file, a folder that may not be read, "~nobody"
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"model {name[:80]!r} cannot be opened: {reason}. Give a model's name or path") from error
