"""Flags of the command line, one for each option of `EngineConfig`, `SamplingParams` and `ServerOptions`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from common.config import CHOICES, EngineConfig, parse_device, stage_options
from common.sampling_params import SamplingParams
from common.serving.options import ServerOptions

Flags = Mapping[str, tuple[Any, str]]
"""Name of an option to (type, help)."""

ENGINE: Flags = {
    "model": (str, "A name, a Hugging Face folder, a hub id, a *.gguf file, or random:tiny-llama and the like."),
    "dtype": (str, "bf16, fp16 or fp32; auto: bf16 where the processor computes in it, fp32 elsewhere."),
    "device": (str, "auto (a GPU where there is one), cpu, cuda, cuda:0, ..."),
    "max_model_len": (int | None, "Most tokens of one request, prompt and output. Without it: the model's own limit."),
    "max_num_seqs": (int, "Most requests that run at the same time."),
    "max_num_batched_tokens": (int, "Most prompt tokens that one step prefills (from m2 on)."),
    "scheduling_policy": (str, f"{' or '.join(map(str, CHOICES['scheduling_policy']))} (from m2 on)."),
    "block_size": (int, "Tokens in one block of the paged KV cache (from m3 on)."),
    "attention_backend": (str, "How attention is computed: auto, naive, or a fast backend (from m4 on)."),
    "prefill_chunk_size": (str | None, "Most prompt tokens in a step with decodes: number or auto (from m5 on)."),
    "target_itl": (float, "Seconds between two tokens of a decoding request that auto aims at (from m5 on)."),
    "fused_kernels": (bool, "Fused kernels around matrix products: Triton's on a GPU, Numba's on a CPU (from m4 on)."),
    "prefix_index": (str, "How cached prefixes are found: hash, or radix: also inside blocks (from m6 on)."),
    "head_bits": (int, "On a GPU, bits of the output head's weights: 8, or 16 as loaded (from m7 on)."),
    "swap_space": (int, "Bytes of CPU memory for the blocks of preempted requests; 0: recompute them (from m3 on)."),
    "cuda_graphs": (bool, "On a GPU, replay steps from CUDA graphs (from m4 on)."),
    "overlap": (bool | None, "Plan the next step while this one runs. Without it: on a GPU (from m2 on)."),
    "kv_cache_memory": (int | None, "Bytes for keys and values. Without it: a share of the free memory."),
    "gpu_memory_utilization": (float, "Share of the GPU's memory to use in all."),
    "seed": (int, "Of the sampling, and of random weights."),
}
SAMPLING: Flags = {
    "n": (int, "Samples of the same prompt (from m3 on, they share its blocks)."),
    "max_tokens": (int, "Most tokens to generate for a prompt."),
    "min_tokens": (int, "Fewest tokens to generate."),
    "temperature": (float, "0 always takes the likeliest token; higher is more varied."),
    "top_k": (int, "Sample among the k likeliest tokens; 0: all."),
    "top_p": (float, "Sample among the likeliest tokens that together reach this probability."),
    "min_p": (float, "Leave out tokens less likely than this share of the likeliest one."),
    "repetition_penalty": (float, "Over 1: tokens seen before become less likely."),
    "presence_penalty": (float, "Subtracted from the logit of each token that the output has."),
    "frequency_penalty": (float, "The same, once for each time the output has it."),
    "stop": (list[str], "Text that ends the output; may be given several times."),
    "ignore_eos": (bool, "Go on after the model says that it has ended."),
    "logprobs": (int | None, "Report log-probabilities of this many likeliest tokens, in --json."),
}


SERVER: Flags = {
    name: (hint.__origin__, *hint.__metadata__)
    for name, hint in get_type_hints(ServerOptions, include_extras=True).items()
    if name != "api_keys"  # the command has a flag of its own for them
}


def with_options(stage: int, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's `config`, and its `params` or `server` where it has them, become the flags that they are
    built from. A stage has no flag for what only later stages have.

    `defaults` are the command's own, where they differ from those of the classes.
    """
    defaults = {"dtype": "auto", "stop": [], **defaults}
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
    option = typer.Option(spelling, help=text, rich_help_panel=panel, show_default=kind is not list[str])
    annotation, default = Annotated[kind, option], defaults.get(name, default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def fastest_dtype(device: str) -> str:
    """bf16 where there is hardware for it; elsewhere it would be emulated, and float32 is faster."""
    if parse_device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
