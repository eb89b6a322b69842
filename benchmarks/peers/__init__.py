"""Engines that people use, on the same workloads, as rows of the same table."""

import importlib

from benchmarks.contestant import Contestant, Setting
from common.errors import UserError

PEERS = {
    "transformers-static": ("benchmarks.peers.transformers_static", "StaticTransformers"),
    "transformers-continuous": ("benchmarks.peers.transformers_continuous", "ContinuousTransformers"),
    **{f"llama.cpp {kind}": ("benchmarks.peers.llama_cpp", "LlamaCpp", kind) for kind in ("Q4_0", "BF16", "Q4_1")},
}
"""Name in the table: module, class, and what else the class is given. Q4_0 is llama.cpp's fastest 4-bit format: it
interleaves the rows of such weights at load."""

INSTALL = {"transformers": "transformers", "llama_cpp": "llama-cpp-python"}


def build_peer(name: str, setting: Setting) -> Contestant:
    """`UserError` that says what to install where the peer's library is missing."""
    module, cls, *more = PEERS[name]
    try:
        return getattr(importlib.import_module(module), cls)(setting, *more)
    except ModuleNotFoundError as error:
        package = INSTALL.get((error.name or "").split(".")[0])
        if package is None:
            raise
        raise UserError(f"{package} is not installed: run `pip install {package}`") from None
