"""What quantising costs in quality: perplexity and greedy agreement, on a text that no calibration has seen."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from benchmarks import cli
from benchmarks.environment import environment
from benchmarks.files import check_writable, write_json
from benchmarks.plots.picture import headed, save_picture
from benchmarks.style import SOFT, color
from common.config import DEFAULT_MODEL, EngineConfig, parse_device
from common.errors import UserError
from common.execution.choose import choose_linear
from common.models.decoder import PROJECTIONS, Decoder
from common.models.linear import Linear, PackedLinear, Projection
from common.models.load import load_tokenizer
from common.models.weights import ModelSource, build_decoder
from common.watch.progress import progress_bar
from stages.m7_gptq.checkpoint.baselines import NF4, RTN, quantize_layers
from stages.m7_gptq.checkpoint.quantize import open_plain
from stages.m7_gptq.checkpoint.texts import DATA, calibration_tokens, tokens
from stages.m7_gptq.fast.choose import choose_fast
from stages.m7_gptq.head import QuantizedHead, round_rows
from stages.m7_gptq.load import load_quantized
from stages.m7_gptq.settings import PER_CHANNEL, Settings

CONTEXT = 1024
TOKENS = 30 * CONTEXT


@dataclass
class Row:
    """One way to hold the weights. agreement: share of positions at which the likeliest next token is bf16's.
    layer_bytes: of the layers that are quantised, with scales and zero points; model_bytes: of the whole model.
    Of m7's rows: kl, mean divergence of next tokens from those of its definition, in nats; layers, what class ran."""

    name: str
    perplexity: float
    agreement: float
    layer_bytes: int
    model_bytes: int
    over_bf16: float = 0.0
    commit: str | None = None
    kl: float | None = None
    layers: str | None = None


FEW = 8  # rows of a step that decodes
DEFINITION = "m7, its definition"
M7: dict[str, tuple[dict[str, Any], int]] = {
    DEFINITION: ({"linear_backend": "naive", "head_bits": 16}, CONTEXT),
    "m7, prefill": ({"head_bits": 16}, CONTEXT),
    "m7, decode": ({"head_bits": 16}, FEW),
    "m7, decode, int8 head": ({"head_bits": 8}, FEW),
}
"""m7 as an engine builds it for this device: its options, and how many rows its layers are given at a time. Kernels for
few rows may compute otherwise than those for many (8-bit activations, say); the definition multiplies in bf16."""

Change = Callable[[ModelSource, Decoder], int]  # replaces the weights of the decoder's projections; returns their bytes


def rows(source: ModelSource, token_ids: torch.Tensor) -> Iterator[tuple[str, Change]]:
    """Every row of the table: its name, and what it does to the model."""
    grid = list(product((True, False), (128, 64, 32)))
    ways: list[Settings | None] = [
        None,
        RTN(bits=8, group_size=PER_CHANNEL, symmetric=True),
        *(RTN(group_size=group, symmetric=symmetric) for symmetric, group in grid),
        NF4(),
        *(Settings(group_size=group, symmetric=symmetric) for symmetric, group in grid),
        *(Settings(group_size=g, symmetric=s, desc_act=True) for g, s in ((64, True), (32, False))),
    ]
    hidden = source.config.hidden_size
    for way in ways:
        yield name_of(way, hidden) if way else "bf16", partial(change, token_ids, way, False)
    yield "int8 head alone", partial(change, token_ids, None, True)
    yield f"int8 head, {name_of(Settings(), hidden)}", partial(change, token_ids, Settings(), True)
    yield from ((name, partial(as_engine, *how)) for name, how in M7.items())


def change(
    token_ids: torch.Tensor, settings: Settings | None, int8_head: bool, source: ModelSource, model: Decoder
) -> int:
    """Quantise the layers (None: leave them), and the output head in 8 bits as well; returns the layers' bytes."""
    if int8_head and isinstance(model.head, Linear | PackedLinear):
        model.head = QuantizedHead(round_rows(model.head.weight))
    if settings is None:
        return projection_bytes(model)
    size = 0
    results = quantize_layers(source, token_ids, settings, model.device)
    for layer, result in zip(model.layers, results, strict=True):
        for projection in PROJECTIONS:
            weight = result.weights[projection]
            size += weight.weights_bytes()
            setattr(layer, projection, choose_linear(weight.dequantize(model.dtype), weight.bias))
    return size


class InPieces:
    """A projection that is given few rows of x at a time, as in a decode step."""

    def __init__(self, projection: Projection, rows: int) -> None:
        self.projection, self.rows, self.weights_bytes = projection, rows, projection.weights_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.projection(part) for part in x.split(self.rows)])


def as_engine(options: dict[str, Any], rows: int, source: ModelSource, model: Decoder) -> int:
    """Take the layers that m7 builds with these options; its other operations stay PyTorch's, in every row alike."""
    config = EngineConfig(model=source.config.name, dtype=model.dtype, device=model.device, **options)
    made = load_quantized(config, choose_fast(config)).model
    for layer, own in zip(model.layers, made.layers, strict=True):
        for projection in PROJECTIONS:
            setattr(layer, projection, InPieces(getattr(own, projection), rows))
    plain = isinstance(made.head, Linear | PackedLinear)  # in bf16, the same for few rows
    model.head = made.head if plain else InPieces(made.head, rows)
    kinds = (type(getattr(p, "projection", p)).__name__ for p in (model.layers[0].qkv_proj, model.head))
    model.note = "; head: ".join(kinds)
    return projection_bytes(model)


def name_of(settings: Settings, hidden: int) -> str:
    """hidden: the width of the layers, which may leave a shorter last group."""
    if settings.method == "nf4":
        return f"NF4, block {settings.group_size}"
    group, tail = settings.group_size, hidden % settings.group_of(hidden)
    parts = [
        f"int{settings.bits} {settings.method.upper()}",
        "per channel" if group == PER_CHANNEL else f"group {group}",
        "symmetric" if settings.symmetric else "asymmetric",
        *(["act-order"] if settings.desc_act else []),
    ]
    return ", ".join(parts) + (f" (last group {tail})" if tail else "")


@torch.inference_mode()
def measure(model: Decoder, token_ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity of a text cut into contexts of CONTEXT tokens, and the likeliest token at each position."""
    total, count = 0.0, 0
    likeliest: list[torch.Tensor] = []
    for part in token_ids.to(model.device).split(CONTEXT):
        positions = torch.arange(len(part), device=model.device)
        logits = model.logits(model(part, positions, attend)).float()
        total += float(F.cross_entropy(logits[:-1], part[1:], reduction="sum"))
        count += len(part) - 1
        likeliest.append(logits.argmax(-1).cpu())
    return math.exp(total / count), torch.cat(likeliest)


@torch.inference_mode()
def divergence(model: Decoder, token_ids: torch.Tensor, definition: Decoder) -> float:
    """KL(definition || model) of the next token in nats, the mean over the same contexts."""
    total = 0.0
    for part in token_ids.to(model.device).split(CONTEXT):
        positions = torch.arange(len(part), device=model.device)
        own, wanted = (m.logits(m(part, positions, attend)).float().log_softmax(-1) for m in (model, definition))
        total += float(F.kl_div(own, wanted, reduction="sum", log_target=True))
    return total / len(token_ids)


@torch.inference_mode()
def measure_all(
    model: cli.Model = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Where the record and the picture go.")] = cli.DEFAULT_FOLDER,
    only: Annotated[str, typer.Option(help="Rows to measure now, by a part of their name.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Rows measured before, too.")] = False,
    device: cli.Device = "auto",
) -> None:
    """Perplexity and greedy agreement of bf16, int8, int4, NF4, GPTQ, int8 head and m7's layers as they run here, as a
    table and a picture.

    Each row is written to `out` when it is done.
    """
    place = parse_device(device)
    path = out / "quality.json"
    check_writable(path, out / "quality.png")
    source = open_plain(model, place, None)
    tokenizer = load_tokenizer(model)
    calibration = calibration_tokens(tokenizer)
    text = tokens(tokenizer, DATA / "evaluation.txt")[:TOKENS]
    known = {} if again else read(path, model)
    commit = environment()["commit"]
    every = list(rows(source, calibration))
    chosen = [(name, change) for name, change in every if only in name and name not in known]
    reference = measure(build_decoder(source, torch.bfloat16, place, False), text)[1] if chosen else torch.empty(0)
    definition: Decoder | None = None  # made at m7's first row; only its others come behind
    with progress_bar("quality", len(chosen)) as advance:
        for name, change in chosen:
            if name in M7 and definition is None:
                definition = build_decoder(source, torch.bfloat16, place, False)
                as_engine(*M7[DEFINITION], source, definition)
            decoder = build_decoder(source, torch.bfloat16, place, False)
            size = change(source, decoder)
            rest = decoder.weights_bytes() - projection_bytes(decoder)
            if isinstance(decoder.head, PackedLinear) and source.config.tie_word_embeddings:
                rest -= decoder.head.weights_bytes()  # a copy of the embedding, laid out for this processor
            perplexity, likeliest = measure(decoder, text)
            agreement = float((likeliest == reference).float().mean())
            row = known[name] = Row(name, perplexity, agreement, size, rest + size, commit=commit)
            if definition is not None:
                row.kl, row.layers = divergence(decoder, text, definition), decoder.note
            advance(1, name)
            _write(path, model, len(text), known)
            print(line(known[name], known.get("bf16")), flush=True)
    known = {name: known[name] for name, _ in every if name in known}  # in the table's order
    _write(path, model, len(text), known)
    if "bf16" in known:
        save_picture(out / "quality.png", lambda: bars([asdict(row) for row in known.values()], model))


def projection_bytes(model: Decoder) -> int:
    """Bytes of the layers that quantising is about."""
    return sum(getattr(layer, projection).weights_bytes() for layer in model.layers for projection in PROJECTIONS)


def line(row: Row, bf16: Row | None) -> str:
    """A row of the table."""
    over = f"{row.perplexity / bf16.perplexity - 1:+7.1%}" if bf16 is not None else " " * 7
    sizes = f"{row.layer_bytes / 1e6:7.1f} MB {row.model_bytes / 1e6:7.1f} MB"
    sizes += "" if row.kl is None else f" KL {row.kl:.5f} ({row.layers})"
    return f"{row.name:<52} {row.perplexity:8.2f} {over} {row.agreement:7.1%} {sizes}"


def read(path: Path, model: str) -> dict[str, Row]:
    """The rows that were measured before, of the same model; `UserError` if the file is no record of them."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: Row(**row) for row in record["rows"]}
        for row in rows.values():
            figures = (row.perplexity, row.agreement, row.layer_bytes, row.model_bytes)
            if not all(math.isfinite(figure) for figure in figures) or row.perplexity <= 0:
                raise ValueError(row)
        return rows if record["model"] == model else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no record of quality: move it away") from error


def _write(path: Path, model: str, count: int, known: dict[str, Row]) -> None:
    for row in known.values():
        row.over_bf16 = row.perplexity / known["bf16"].perplexity - 1 if "bf16" in known else 0.0
    figures = {"context": CONTEXT, "tokens": count, "rows": [asdict(row) for row in known.values()]}
    record = {"environment": environment(), "model": model, **figures}
    write_json(path, record)


def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One whole sequence, causal."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def bars(rows: Sequence[Mapping[str, Any]], model: str) -> plt.Figure:
    """Perplexity over bf16 of every row, one bar each; the bytes of the quantised layers next to it."""
    reference = next(row for row in rows if row["name"] == "bf16")
    shown = [row for row in rows if row is not reference]
    figure, axis = plt.subplots(figsize=(11, 0.42 * len(shown) + 1.2))
    for y, row in enumerate(reversed(shown)):
        over = row["perplexity"] / reference["perplexity"] - 1
        axis.barh(y, over, color=color("m7") if "GPTQ" in row["name"] or row["name"] in M7 else "#B0B0B0", height=0.65)
        text = f"{over:+.1%}   {row['layer_bytes'] / 1e6:.0f} MB   agrees {row['agreement']:.0%}"
        axis.annotate(text, (max(over, 0), y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=12)
    axis.set_yticks(range(len(shown)), [row["name"] for row in reversed(shown)], fontsize=12)
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlim(right=axis.get_xlim()[1] * 1.75)
    axis.set_xlabel(f"perplexity over bf16's {reference['perplexity']:.2f} (less is better)", loc="left")
    note = f"MB: of the quantised layers, {reference['layer_bytes'] / 1e6:.0f} in bf16. Agrees: bf16 thinks the same "
    note += f"token likeliest. {model}"
    return headed(figure, "What fewer bits cost in perplexity", note)
