"""Whether the numbers of a quantised layer can be those of a linear layer: damage that neither shape nor type shows.
Without them a checkpoint with a wrong label, or a damaged one, loads like any other and the model writes '!!!!'."""

import math
from collections.abc import Sequence

import torch

from common.errors import require
from common.models.quantized_weight import Format, QuantizedWeight
from common.models.sources.quantized_folder import AGAIN

LARGEST_WEIGHT = 1000.0  # No linear layer of a language model holds weights anywhere near it
ZERO_SCALES = 0.01  # Largest share of scales that are 0: those of the few weights that float16 rounds to nothing

SHIFT = 0.5
"""Mean of code - zero, in steps of the grid, that means zero points off by one. In SmolLM2 it is at most 0.09."""
SURE = 6.0  # Standard errors by which it must also be away from 0: with 256 steps a few thousand weights say nothing


def check_version(label: str, layer: Sequence[QuantizedWeight], symmetric: bool, form: Format) -> None:
    """`UserError` if the weights of a whole decoder layer show that zero points are stored in the other version.
    Version 1 read as version 2, or the reverse, shifts every weight by one step of the grid."""
    lie = 1 if form == "gptq" else -1  # what the wrong version adds to every zero point
    if symmetric:
        middle = 2 ** (layer[0].bits - 1)
        wrong = all(float((weight.zeros == middle + lie).float().mean()) > 0.5 for weight in layer)
    else:
        codes = torch.cat([weight.codes().flatten() for weight in layer]).float()
        error = float(codes.std()) / math.sqrt(codes.numel())
        total = sum(_shift(weight) * weight.in_features * weight.out_features for weight in layer)
        wrong = -lie * total / codes.numel() > max(SHIFT, SURE * error)
    other, files = "gptq_v2" if form == "gptq" else "gptq", "config.json and quantize_config.json"
    said = f"{label}: the zero points are not stored as checkpoint_format {form!r} says"
    require(not wrong, f"{said}: it seems to be {other!r}. Correct it in {files}")


def check_numbers(name: str, weight: QuantizedWeight, symmetric: bool) -> None:
    """`UserError` unless a linear layer's scales, groups of inputs, codes and zero points are plausible."""
    scales = weight.scales.float()
    require(bool(scales.isfinite().all()), f"{name}.scales are not finite: {AGAIN}")
    require(bool((scales >= 0).all()), f"{name}.scales are negative: {AGAIN}")
    zero = float((scales == 0).float().mean())
    require(zero <= ZERO_SCALES, f"{name}.scales are 0, {zero:.0%} of them: {AGAIN}")
    largest = float(scales.max()) * (2**weight.bits - 1)
    require(largest <= LARGEST_WEIGHT, f"{name}.scales stand for weights of up to {largest:.0f}: {AGAIN}")
    most = int(_group_sizes(weight).max())
    require(most <= weight.group_size, f"{name}.g_idx puts {most} inputs into a group of {weight.group_size}: {AGAIN}")
    middle = 2 ** (weight.bits - 1)
    expected = not symmetric or bool((weight.zeros == middle).any())
    require(expected, f"{name}.qzeros hold no {middle}, although the checkpoint says that it is symmetric: {AGAIN}")
    steps = abs(_shift(weight)) * 15 / (2**weight.bits - 1)
    require(steps <= SHIFT, f"{name}: codes and zero points do not belong together: {AGAIN}")


def _shift(weight: QuantizedWeight) -> float:
    """Mean of code - zero over all weights."""
    zeros = _group_sizes(weight).float() @ weight.zeros.float() / weight.in_features
    return float(weight.codes().float().mean() - zeros.mean())


def _group_sizes(weight: QuantizedWeight) -> torch.Tensor:
    """The inputs of each group, int64 [groups]."""
    return weight.group_index().bincount(minlength=weight.groups)
