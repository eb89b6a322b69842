"""From a model's name to the model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from common.config import DEFAULT_MODEL, parse_device, parse_dtype
from common.errors import UserError
from common.models.decoder import Decoder
from common.models.sources.embedded import open_embedded
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.hf_folder import HFFolder
from common.models.sources.hub import fetch, is_hub_id
from common.models.sources.nf4_folder import NF4Folder, is_bitsandbytes_folder
from common.models.sources.quantized_folder import QuantizedFolder, is_quantized_folder
from common.models.sources.random_weights import PREFIX, PRESETS, RandomSource
from common.models.weights import ModelSource, build_decoder
from common.text.tokenizer import Tokenizer


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool | None = False,
) -> Decoder:
    """The decoder of that name (see `open_source`), its weights on `device` in `dtype`.

    seed: of random weights. progress: None draws a bar where standard error is a terminal. Raises `UserError` for
    anything that cannot be loaded.
    """
    place = parse_device(device)
    source = open_source(name, place, seed, progress)
    with torch.inference_mode():
        decoder = build_decoder(source, parse_dtype(dtype), place, progress)
    if isinstance(source, QuantizedFolder):
        decoder.note = source.note
    return decoder


def load_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of the model of that name; None where the model comes without one."""
    return open_source(name).tokenizer()


def open_source(
    name: str, device: torch.device | None = None, seed: int = 0, progress: bool | None = False
) -> ModelSource:
    """`smollm2-135m-instruct`; `random:<preset>`; a *.gguf file; a Hugging Face folder; a hub id `Org/Name`.

    A folder in GPTQ's format, or in NF4, gives its dequantised weights.
    """
    if name == DEFAULT_MODEL:
        return open_embedded(progress)
    if name.startswith(PREFIX):
        return RandomSource(name, device or torch.device("cpu"), seed)
    folder = find_folder(name)
    if folder is not None:
        label = name if is_hub_id(name) else None
        return open_quantized_folder(folder, label) if is_quantized_folder(folder) else HFFolder(folder, label)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no file {name}")
        from common.models.sources.gguf_file import GGUFFile

        return GGUFFile(path)
    if path.is_file():
        raise UserError(f"{name} is a file, but no *.gguf: give the Hugging Face folder that it lies in")
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
