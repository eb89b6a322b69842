"""The baselines that GPTQ is compared with, which look at no text: round to nearest (RTN), and NF4.

NF4: 16 values at quantiles of the normal distribution, and the largest weight of each block as its scale (Dettmers et
al., "QLoRA", NeurIPS 2023, appendix E).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from common.errors import require
from common.models.decoder import PROJECTIONS
from common.models.quantized_weight import WORD, QuantizedWeight
from common.models.sources.nf4 import BLOCK, NF4Weight, table
from common.models.sources.quantized_folder import is_quantized
from common.models.weights import ModelSource, Part, build_layer, loader, tensor_shapes
from stages.m7_gptq.calibrate import Finished, QuantizedLayer, calibrate_layers
from stages.m7_gptq.grid import assemble, fit_grid
from stages.m7_gptq.linear import ReadQuantized
from stages.m7_gptq.settings import Settings


@dataclass(frozen=True)
class Baseline(Settings):
    """`Settings` of another method; `UserError` for a choice that the method does not leave."""

    unused: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in self.unused}
        other = ", ".join(f"{word}={value}" for word, value in given.items() if value != getattr(type(self), word))
        require(not other, f"{self.method} has no use for some of these settings: leave out {other}")


@dataclass(frozen=True)
class RTN(Baseline):
    method = "rtn"
    unused = ("desc_act", "damping")


@dataclass(frozen=True)
class NF4(Baseline):
    group_size: int = BLOCK
    method = "nf4"
    unused = ("bits", "group_size", "symmetric", "desc_act", "search", "damping")


METHODS: dict[str, type[Settings]] = {kind.method: kind for kind in (Settings, RTN, NF4)}

ROUNDED = RTN(group_size=128, search=False)  # for random weights, which are there for speed alone
SMALLEST = 1e-38  # blocks with no larger weight become zeros, as in bitsandbytes: its inverse would not be finite


def to_nf4(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NF4Weight:
    """Round a weight [out, in] to the nearest values of its blocks of 64, to the codes that bitsandbytes finds."""
    values = table(weight.device)
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    shares = blocks * (1 / scales.clamp(min=SMALLEST))[..., None]
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8).flatten(1)
    return NF4Weight(codes[:, ::2] << 4 | codes[:, 1::2], scales, bias)


def round_to_nearest(weight: torch.Tensor, settings: Settings, bias: torch.Tensor | None = None) -> QuantizedWeight:
    """Round a weight [out, in] to the grids of its groups, each weight for itself ("RTN")."""
    columns = weight.float().T
    group = settings.group_of(columns.shape[0])
    grids = [fit_grid(part, settings) for part in columns.split(group)]
    codes = torch.cat([g.codes(part) for g, part in zip(grids, columns.split(group), strict=True)])
    return assemble(codes, grids, None, settings, bias)


def quantize_layers(
    source: ModelSource,
    token_ids: torch.Tensor,
    settings: Settings,
    device: torch.device,
    finished: Finished = lambda index: None,
) -> Iterator[QuantizedLayer]:
    """Quantise layer after layer by the method of the settings; token_ids [sequences, length]: text, for GPTQ alone."""
    check_shapes(source, settings)
    if settings.method == "gptq":
        return calibrate_layers(source, token_ids, settings, device, finished)
    return _round_layers(source, settings, device, finished)


def check_shapes(source: ModelSource, settings: Settings) -> None:
    """`UserError` where the checkpoint format has no place for one of the model's matrices. All layers are alike."""
    for name, shape in tensor_shapes(source.config).items():
        if name.startswith("model.layers.0.") and is_quantized(name):
            check_shape(settings, f"{source.config.name}: {name}", shape[1], shape[0])


def check_shape(settings: Settings, name: str, in_features: int, out_features: int) -> None:
    if settings.method == "nf4":
        fits = in_features % BLOCK == 0
        require(fits, f"{name} has {in_features} inputs: they must be a multiple of {BLOCK} to be stored in NF4")
        return
    count = WORD // settings.bits
    fits = in_features % count == 0 and out_features % count == 0
    stored = f"both must be multiples of {count} to be stored in {settings.bits} bits"
    require(fits, f"{name} is {out_features} x {in_features}: {stored}")


def _round_layers(
    source: ModelSource, settings: Settings, device: torch.device, finished: Finished
) -> Iterator[QuantizedLayer]:
    """`calibrate_layers` for the baselines: no text, and no outputs computed."""
    load = loader(source, torch.float32, device)
    for index in range(source.config.num_layers):
        result = finished(index)
        if result is None:
            layer, result = build_layer(source.config, index, load), QuantizedLayer({}, {})
            for name in PROJECTIONS:
                weight, bias = getattr(layer, name).weight, getattr(layer, name).bias
                nf4 = settings.method == "nf4"
                result.weights[name] = to_nf4(weight, bias) if nf4 else round_to_nearest(weight, settings, bias)
        result.check(index)
        yield result


def rounding_reader(
    source: ModelSource, settings: Settings = ROUNDED, part: Callable[[str], Part] = lambda name: ()
) -> ReadQuantized:
    """Every projection rounded to nearest: what a 4-bit model costs in time and memory, not how well it answers.
    part: what is held of a layer, which is rounded as a whole."""
    shapes = tensor_shapes(source.config)

    def read(names: list[str], bias: bool) -> list[QuantizedWeight | None]:
        # One tensor after the other as other stages read them: random weights are then theirs, before rounding.
        full = [f"{name}.weight" for name in names]
        weights = [round_to_nearest(source.read(name, shapes[name]), settings) for name in full]
        biases = [source.read(f"{name}.bias", shapes[f"{name}.bias"]) if bias else None for name in names]
        return [replace(w, bias=b).part(part(n), n) for n, w, b in zip(names, weights, biases, strict=True)]

    return read
