"""Flags of the command line, one for each option of `EngineConfig`, `SamplingParams` and `ServerOptions`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import torch
import typer

from common.config import EngineConfig, parse_device, stage_options
from common.sampling_params import SamplingParams
from common.serving.options import ServerOptions

Flags = Mapping[str, tuple[Any, str]]  # name of an option to (type, help)

TEXTS = dict.fromkeys(("prefill_chunk_size", "chat_template_kwargs", "schema"), str | None)
LISTS = dict.fromkeys(("stop", "allow_origin"), list[str])
TYPES = {"dtype": str, "device": str, **LISTS, **TEXTS}  # of flags, where it is not that of the option


def flags_of(options: type) -> Flags:
    """A flag for each option with a note."""
    hints = {n: h for n, h in get_type_hints(options, include_extras=True).items() if get_origin(h) is Annotated}
    return {name: (TYPES.get(name, hint.__origin__), *hint.__metadata__) for name, hint in hints.items()}


ENGINE, SAMPLING, SERVER = flags_of(EngineConfig), flags_of(SamplingParams), flags_of(ServerOptions)


def with_options(stage: int, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's `config`, and its `params` or `server` where it has them, become the flags that they are
    built from. A stage has no flag for what only later stages have.

    `defaults` are the command's own, where they differ from those of the classes.
    """
    defaults = {"dtype": "auto", "stop": [], "allow_origin": [], **defaults}
    groups: dict[str, tuple[Flags, type, str]] = {
        "config": (stage_options(stage, ENGINE), EngineConfig, "Engine"),
        "params": (SAMPLING, SamplingParams, "Sampling"),
        "server": (SERVER, ServerOptions, "Server"),
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for n, p in signature.parameters.items() if n not in groups]
        built = {name: group for name, group in groups.items() if name in signature.parameters}
        for flags, options, panel in built.values():
            parameters += [_parameter(name, *flag, options, panel, defaults) for name, flag in flags.items()]

        @functools.wraps(command)
        def with_flags(**values: Any) -> None:
            if values["dtype"] == "auto":
                values["dtype"] = fastest_dtype(values["device"])
            for argument, (flags, options, _) in built.items():
                values[argument] = options(**{name: values.pop(name) for name in flags})
            command(**values)

        with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


def _parameter(
    name: str, kind: Any, text: str, options: type, panel: str, defaults: Mapping[str, Any]
) -> inspect.Parameter:
    default = getattr(options, name)
    spelling = f"--{name.replace('_', '-')}"
    if default is not False and kind in (bool, bool | None):
        spelling += f"/--no{spelling[1:]}"
    shown: dict[str, Any] = {"help": text, "rich_help_panel": panel, "show_default": kind is not list[str]}
    option = typer.Option(spelling, envvar="FOLOVLLM_ADMIN_KEY" if name == "admin_key" else None, **shown)
    annotation, default = Annotated[kind, option], defaults.get(name, default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def fastest_dtype(device: str) -> str:
    """bf16 where there is hardware for it; elsewhere it would be emulated, and float32 is faster."""
    if parse_device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
