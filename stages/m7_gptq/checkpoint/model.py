"""Which checkpoint an engine gets: a folder's own, one made before, or one made now."""

from __future__ import annotations

import torch

from common.config import DEFAULT_MODEL
from common.models.load import QuantizedFolder, find_folder, open_quantized_folder
from common.models.sources.gptq_folder import is_quantized_folder
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.settings import Settings


def open_quantized(model: str, device: torch.device) -> QuantizedFolder:
    """The model's checkpoint: the folder that it is, or its quantised twin in the cache, made where it is missing."""
    folder = find_folder(model) if model != DEFAULT_MODEL else None
    if folder is None or not is_quantized_folder(folder):
        folder = quantize(model, Settings(), device=device).folder
    return open_quantized_folder(folder, model)
