"""Engines that people use, on the same workloads, as rows of the same table."""

import importlib

from benchmarks.contestant import Contestant, Setting
from common.errors import UserError

PEERS = {
    "transformers-static": ("benchmarks.peers.transformers_static", "StaticTransformers"),
    "transformers-continuous": ("benchmarks.peers.transformers_continuous", "ContinuousTransformers"),
    "llama.cpp": ("benchmarks.peers.llama_cpp", "LlamaCpp"),
}
"""Name in the table: module and class."""

INSTALL = {"transformers": "transformers", "llama_cpp": "llama-cpp-python"}


def build_peer(name: str, setting: Setting) -> Contestant:
    """`UserError` that says what to install where the peer's library is missing."""
    module, cls = PEERS[name]
    try:
        return getattr(importlib.import_module(module), cls)(setting)
    except ModuleNotFoundError as error:
        package = INSTALL.get((error.name or "").split(".")[0])
        if package is None:
            raise
        raise UserError(f"{package} is not installed: run `pip install {package}`") from None
