"""From a model's name to a folder with its quantised twin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.models.embedded import cache_root
from common.models.load import open_source
from common.models.random_weights import PREFIX
from common.models.weights import ModelSource, tensor_shapes
from common.options import require
from common.progress import progress_bar
from stages.m7_gptq.calibrate import quantize_layers
from stages.m7_gptq.checkpoint import GPTQFolder
from stages.m7_gptq.settings import Settings
from stages.m7_gptq.texts import calibration_tokens, fingerprint
from stages.m7_gptq.write import Writer, check_target


@dataclass(frozen=True)
class Report:
    """Where the model is, and the loss of each layer's projections; no losses where it was there already."""

    folder: Path
    losses: list[dict[str, float]]


def cached_folder(model: str, settings: Settings) -> Path:
    """Where the quantised model lies if no other folder is asked for."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    return cache_root() / "gptq" / f"{name}-{settings.name}"


def is_made(folder: Path, settings: Settings) -> bool:
    """Does a whole model lie there already? `UserError` if it is one that was made with other settings."""
    try:
        found = GPTQFolder(folder)
        found.check()
    except UserError:
        return False
    stored = found.stored
    same = (stored.bits, stored.group_size, stored.symmetric, stored.desc_act) == (
        settings.bits,
        settings.group_size,
        settings.symmetric,
        settings.desc_act,
    )
    require(same, f"{folder} holds a model with other settings: give another --out, or --again to replace it")
    return True


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
) -> Report:
    """Quantise the model of that name (see `open_source`) and write it to `out`, or to the cache.

    text: another calibration text. again: even if a whole model lies there. progress: None draws a bar where standard
    error is a terminal. `UserError` before the run for whatever cannot be done.
    """
    require(not model.startswith(PREFIX), f"{model} is made anew at every start: there is nothing worth a folder")
    folder = out or cached_folder(model, settings)
    check_target(folder)
    if not again and is_made(folder, settings):
        return Report(folder, [])
    place = device or torch.device("cpu")
    source = open_source(model, place, progress=progress)
    token_ids = torch.empty(0, 0, dtype=torch.int64)
    if settings.method == "gptq":
        token_ids = calibration_tokens(source.tokenizer(), text)
    _check_shapes(source, settings)
    embedding = source.read("model.embed_tokens.weight", tensor_shapes(source.config)["model.embed_tokens.weight"])
    writer = Writer(
        source,
        settings,
        folder,
        {"model": model, "text": fingerprint(token_ids), "weights": fingerprint(embedding[:256])},
    )
    losses: list[dict[str, float]] = []
    with progress_bar(f"quantising {source.config.name}", source.config.num_layers, show=progress) as advance:
        for index, layer in enumerate(quantize_layers(source, token_ids, settings, place, writer.finished)):
            if writer.finished(index) is None:
                writer.add(index, layer)
            losses.append(layer.losses)
            advance(1, f"layer {index}, loss {sum(layer.losses.values()):.3g}")
    writer.finish()
    return Report(folder, losses)


def _check_shapes(source: ModelSource, settings: Settings) -> None:
    for name, shape in tensor_shapes(source.config).items():
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight"):
            settings.check(f"{source.config.name}: {name}", shape[1], shape[0])
