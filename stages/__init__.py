"""The eight engines. `build("m1", model=...)` also takes 1, "1", "stage1" and "m1_kv_cache"."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import EngineConfig, refuse_later_options
from common.engine import Engine
from common.errors import unknown
from common.execution.parallel.start import on_ranks


def names() -> list[str]:
    """Folder names of the stages that exist, in order: `['m0_baseline', 'm1_kv_cache', ...]`."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("m[0-9]_*/engine.py"))


def resolve(stage: str | int) -> str:
    """The folder name of a stage given in any of its spellings; `UserError` for one that does not exist."""
    folders = names()
    wanted = str(stage).lower()
    for folder in folders:
        short = folder.split("_")[0]
        if wanted in (folder, short, short[1:], f"stage{short[1:]}"):
            return folder
    raise unknown("stage", stage, [f"{f.split('_')[0]} ({f})" for f in folders])


def short_name(stage: str | int) -> str:
    """`'m1'` for any spelling of it."""
    return resolve(stage).split("_")[0]


def number(stage: str | int) -> int:
    """3 for any spelling of m3."""
    return int(resolve(stage)[1])


def build(stage: str | int, **options: Any) -> Engine:
    """Build a stage's engine; `options` are those of `EngineConfig`."""
    config = config_for(stage, options)
    return on_ranks(importlib.import_module(f"stages.{resolve(stage)}.engine").build)(config)


def config_for(stage: str | int, options: Mapping[str, Any]) -> EngineConfig:
    """The options, checked; `UserError` for one that does not exist, or that the stage does not have."""
    refuse_later_options(number(stage), options)
    config = EngineConfig(**options)
    if "attention_backend" in options:
        importlib.import_module("stages.m4_flash_attention.fast.select").check_name(config.attention_backend)
    return config
