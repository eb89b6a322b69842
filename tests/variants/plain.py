"""Folders that nothing is special about."""

from pathlib import Path

from tests.models import reference
from tests.variants import variant

IDS = ("--token-ids", "1, 7, 30")


@variant("plain: a small Llama without a tokenizer", options=IDS)
def plain(folder: Path) -> Path:
    reference.save("llama, 3 queries a KV head", folder)
    return folder


@variant("plain: an empty folder", refused="has no config.json: give")
def empty(folder: Path) -> Path:
    return folder
