"""Options that several commands have, and what their values stand for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.files import check_writable
from common.errors import require

DEFAULT_FOLDER = Path("reports/local")
PICTURE = "picture.png"  # any picture, to check that a folder takes files


def _writable(folder: Path) -> Path:
    check_writable(folder / PICTURE)
    return folder


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PictureFolder = Annotated[Path | None, typer.Option(help="Of pictures; default: that of --json, or reports/local.")]
Folder = Annotated[Path, typer.Option("--out-dir", callback=_writable, help="Of results, traces and pictures.")]
Model = Annotated[str, typer.Option(help="A name, a folder, a GGUF file, a hub id, or random:<preset>.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32; bf16 is what people deploy.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to test the harness; measures nothing.")]
EngineOptions = Annotated[list[str] | None, typer.Option("--engine", help="NAME=VALUE: an engine option.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Results; default: in the folder of the pictures.")]


def places(json_path: Path | None, out_dir: Path | None, name: str) -> tuple[Path, Path]:
    """The results file, called `name` unless it is given, and the folder of the pictures. Both can be written."""
    folder = out_dir or (json_path.parent if json_path else DEFAULT_FOLDER)
    path = json_path or folder / name
    check_writable(path, folder / PICTURE)
    return path, folder


def engine_options(pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` as engine options; a value is JSON where it can be read as JSON, else text."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        require(bool(equals), f"--engine takes NAME=VALUE, for example kv_cache_memory=100000000, not {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
