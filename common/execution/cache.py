"""Where the project keeps what is costly to make: the converted model, quantised models, compiled kernels."""

import os
from pathlib import Path


def cache_root() -> Path:
    """$FOLOVLLM_CACHE, or `folovllm` in the user's cache directory."""
    chosen = os.environ.get("FOLOVLLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "folovllm"
