"""Tables of the files that hold no stages: attention kernels, quality, and whatever else is a list of measurements."""

from typing import Any

from benchmarks.attention import cells
from benchmarks.report.blocks import TEXTS, folded, table
from benchmarks.report.sources import Sheet
from benchmarks.table import DASH, size

MANY = 30  # rows of a table from which on it is folded away


def sheet_blocks(sheet: Sheet) -> list[str]:
    if sheet.kind in KINDS:
        return KINDS[sheet.kind](sheet)
    found = _anything(sheet.rows)
    return [folded(f"{len(sheet.rows)} measurements", [found]) if len(sheet.rows) > MANY else found]


def _attention(sheet: Sheet) -> list[str]:
    rows = [[r["step"], r["backend"], *cells(r)] for r in sheet.rows]
    text = TEXTS["attention"].format(**sheet.values["config"], **sheet.values["ceilings"])
    return [text, table(("step", "backend", "time", "rate", "of ceiling"), rows, words=2)]


def _quality(sheet: Sheet) -> list[str]:
    plain = next((row for row in sheet.rows if row["name"] == "bf16"), None)
    rows: list[list[str]] = []
    for row in sheet.rows:
        over = f"{row['perplexity'] / plain['perplexity'] - 1:+.1%}" if plain and row is not plain else "–"
        sizes = [size(row["layer_bytes"]), size(row["model_bytes"])]
        far = DASH if row.get("kl") is None else f"{row['kl']:.5f}"
        rows.append([row["name"], f"{row['perplexity']:.2f}", over, f"{row['agreement']:.1%}", *sizes, far])
    headers = ("weights", "perplexity", "over bf16", "same likeliest token", "quantised layers", "whole model", "KL*")
    rows.sort(key=lambda row: row[0] != "bf16")
    model, tokens, context = (sheet.values.get(name) for name in ("model", "tokens", "context"))
    kl = "KL*: of next tokens from those of m7's definition, in nats"
    return [table(headers, rows, caption=f"{model}, {tokens} tokens in contexts of {context}. {kl}")]


def _interop(sheet: Sheet) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sheet.values.get("versions", {}).items())
    text = TEXTS["interop"].format(model=sheet.values.get("model"), versions=versions)
    absent = [who for who, side in (("m7", "ours"), ("GPTQModel", "theirs")) if not sheet.values[side]]
    if absent:
        text += f" Not measured yet: checkpoints written by {' and '.join(absent)} (`make gptq-interop`)."
    return [text, *([_anything(sheet.rows)] if sheet.rows else [])]


def _anything(rows: list[dict[str, Any]]) -> str:
    """Every value that is a word or a number, under its name; columns in which nothing differs go to the caption."""
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, str | int | float)))
    same = [name for name in names if len(rows) > 2 and len({str(row.get(name)) for row in rows}) == 1]
    names = [name for name in names if name not in same]
    caption = ", ".join(f"{name.replace('_', ' ')}: {_cell(rows[0][name])}" for name in same)
    words = [n for n in names if any(isinstance(row.get(n), str) for row in rows)]
    names = words + [n for n in names if n not in words]
    values = [[_cell(row.get(name)) for name in names] for row in rows]
    return table([name.replace("_", " ") for name in names], values, words=len(words), caption=caption)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


KINDS = {"attention": _attention, "quality": _quality, "interop": _interop}
