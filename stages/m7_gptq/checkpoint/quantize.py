"""From a model's name to a folder with the quantised model."""

import hashlib
import json
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout

from common.errors import UserError, require
from common.execution.cache import cache_root
from common.models.load import open_quantized_folder, open_source
from common.models.quantized_weight import PER_CHANNEL
from common.models.sources.quantized_folder import QuantizedFolder
from common.models.sources.random_weights import PREFIX
from common.models.weights import ModelSource, tensor_shapes
from common.watch.progress import progress_bar, say
from stages.m7_gptq.calibrate import QuantizedLayer
from stages.m7_gptq.checkpoint.baselines import check_shapes, quantize_layers
from stages.m7_gptq.checkpoint.texts import CALIBRATION, LENGTH, SEQUENCES, calibration_tokens, fingerprint, read
from stages.m7_gptq.checkpoint.write import RECIPE, Writer, check_target
from stages.m7_gptq.settings import Settings

VERSION = 1  # raised when the algorithm gives other weights: what an older one left is then made again
LONGEST_NAME = 150  # of a folder in the cache, in letters, of the 255 that a file system takes


@dataclass(frozen=True)
class Report:
    """Where the model is, and the losses of each layer's projections, if calibrated; no layers if it was there."""

    folder: Path
    losses: list[dict[str, float]]


def cached_folder(model: str, settings: Settings, text: Path | None = None) -> Path:
    """Where the quantised model lies if no other folder is asked for."""
    words = f"{model}-{short_name(settings)}" + (f"-{text.stem}" if text else "")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-.")
    if len(name) > LONGEST_NAME:
        name = f"{fingerprint(words.encode())}-{name[-LONGEST_NAME:].strip('-.')}"
    return cache_root() / "gptq" / name


def short_name(settings: Settings) -> str:
    """For folders: `4bit-g64-sym-gptq`, and whatever is not usual."""
    if settings.method == "nf4":
        return f"{settings.bits}bit-g{settings.group_size}-nf4"
    group = "channel" if settings.group_size == PER_CHANNEL else f"g{settings.group_size}"
    parts = [f"{settings.bits}bit", group, "sym" if settings.symmetric else "asym", settings.method]
    parts += ["desc_act"] * settings.desc_act + ["nosearch"] * (not settings.search)
    return "-".join(parts + [f"damp{settings.damping:g}"] * (settings.damping != Settings.damping))


def recipe_of(source: ModelSource, settings: Settings, text: Path | None, progress: bool | None) -> dict[str, Any]:
    """All that the quantised folder depends on."""
    recipe: dict[str, Any] = {"version": VERSION, "model": model_fingerprint(source, progress)}
    recipe |= {**vars(settings), "method": settings.method}
    if settings.method == "gptq":
        recipe["text"] = fingerprint(read(text or CALIBRATION).encode())
        recipe |= {"sequences": SEQUENCES, "length": LENGTH}
    return recipe


def model_fingerprint(source: ModelSource, progress: bool | None) -> str:
    """Of a model's configuration, its tokenizer, and every number of its weights: 135 million take half a second."""
    tokenizer, shapes = source.tokenizer(), tensor_shapes(source.config)
    words: list[Any] = [source.config.to_hf()]
    if tokenizer is not None:
        words += [tokenizer.backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens]
    found = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    with progress_bar(f"looking at {source.config.name}", len(shapes), show=progress) as advance:
        for name, shape in shapes.items():
            tensor = source.read(name, shape).cpu().contiguous()
            found.update(f"{name} {tensor.dtype}".encode())
            found.update(tensor.view(torch.uint8).numpy().data)
            advance(1)
    return found.hexdigest()[:16]


def differences(folder: Path, recipe: dict[str, Any]) -> list[str] | None:
    """In what a whole model that lies there was made otherwise, by the recipe's words; None where none lies there."""
    try:
        found = open_quantized_folder(folder)
        found.check()
    except UserError:
        return None
    meta = cast(dict[str, Any], found.meta) if isinstance(found.meta, dict) else {}
    stored = meta.get(RECIPE)
    return [word for word in recipe if not isinstance(stored, dict) or stored.get(word) != recipe[word]]


@torch.inference_mode()
def quantize(
    model: str,
    settings: Settings,
    out: Path | None = None,
    *,
    text: Path | None = None,
    device: torch.device | None = None,
    again: bool = False,
    progress: bool | None = None,
    source: ModelSource | None = None,
) -> Report:
    """Quantise the model of that name (see `open_source`) and write it to `out`, or to the cache.

    text: another calibration text. again: even if a whole model lies there. progress: None draws a bar on a terminal.
    source: the model, where it is open already.
    In the cache an older version is replaced. One process at a time: others wait.
    """
    gptq = settings.method == "gptq"
    require(text is None or gptq, f"{settings.method} looks at no text: leave it out, or take gptq")
    require(not model.startswith(PREFIX), f"{model} is made at every start: there is nothing worth a folder")
    folder = out or cached_folder(model, settings, text)
    check_target(folder)
    place = device or torch.device("cpu")
    source = source or open_plain(model, place, progress)
    recipe = recipe_of(source, settings, text, progress)
    if not again and differences(folder, recipe) == []:
        return Report(folder, [])
    check_shapes(source, settings)
    token_ids = calibration_tokens(source.tokenizer(), text) if gptq else torch.empty(0, 0, dtype=torch.int64)
    with only_one(model, folder):
        others = differences(folder, recipe)
        if not again and others == []:  # another process has made it meanwhile
            return Report(folder, [])
        made = f"{folder} holds a model that was made otherwise ({', '.join(others or ())})"
        require(not (out and others) or again, f"{made}: give another --out, or --again to replace it")
        writer = Writer(source, settings, folder, recipe, again)
        layers = quantize_layers(source, token_ids, settings, place, writer.finished)
        return _write(writer, layers, progress)


def _write(writer: Writer, layers: Iterator[QuantizedLayer], progress: bool | None) -> Report:
    name, began = writer.source.config.name, time.perf_counter()
    say(f"quantising {name} to {writer.settings.bits} bits, once: it will be kept in {writer.folder}")
    losses: list[dict[str, float]] = []
    with progress_bar(f"quantising {name}", writer.source.config.num_layers, show=progress) as advance:
        for index, layer in enumerate(layers):
            if writer.finished(index) is None:
                writer.add(index, layer)
            losses.append(layer.losses)
            loss = f", loss {sum(layer.losses.values()):.3g}" if layer.losses else ""
            advance(1, f"layer {index}{loss}")
    writer.finish()
    say(f"quantised {name} in {time.perf_counter() - began:.0f} s")
    return Report(writer.folder, losses)


@contextmanager
def only_one(model: str, folder: Path) -> Generator[None]:
    """Within, no other process makes this folder; the system lets go of the lock when a process dies."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is quantising {model} into {folder}; waiting for it")
        lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Give another --out") from error
    try:
        yield
    finally:
        lock.release()


def open_plain(model: str, device: torch.device, progress: bool | None) -> ModelSource:
    """The model of that name; `UserError` if it is quantised already."""
    source = open_source(model, device, progress=progress)
    plain = not isinstance(source, QuantizedFolder)
    require(plain, f"{model} is quantised already: give the model that it was made from")
    return source
