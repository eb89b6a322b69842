"""What the figures were measured on: hardware, library versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "flash-attn", "numba"),
    *("llama-cpp-python", "gguf", "llguidance"),
)
FLAGS_THAT_MATTER = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Hardware, versions and commit as plain JSON values; null where something cannot be found out.

    A copy without the project's git history (carried to a GPU machine, say) names its commit in FOLOVLLM_COMMIT.
    """
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    given, git, not_code = os.environ.get("FOLOVLLM_COMMIT"), ("git", "-C", str(ROOT)), (":!reports", ":!*.ipynb")
    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "hardware": {
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "cpu_flags": [flag for flag in FLAGS_THAT_MATTER if flag in flags],
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory_bytes(),
            "gpu": _gpu("name"),
            "gpu_driver": _gpu("driver_version"),
        },
        "versions": {"python": platform.python_version(), "system": platform.platform(), **libraries},
        "commit": given or _output(*git, "rev-parse", "HEAD") or None,
        "uncommitted_changes": not given and bool(_output(*git, "status", "--porcelain", "--", ".", *not_code)),
    }


INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 for bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""What decides how fast a CPU multiplies, the best first: clouds give very different CPUs the same name."""


def short_hardware(found: dict[str, Any], device: str) -> str:
    """One phrase for titles: the GPU's name, or the CPU's with its instructions and threads."""
    hardware = found["hardware"]
    if device.startswith("cuda"):
        return str(hardware["gpu"] or "GPU").splitlines()[0]
    name = str(hardware["cpu"]).replace("(R)", "").replace("(TM)", "").split(" @")[0]
    threads, flags = hardware["threads"], hardware.get("cpu_flags") or ()
    best = next((f" ({known})" for flag, known in INSTRUCTIONS.items() if flag in flags), "")
    return f"{' '.join(name.split())}{best}, {threads} thread{'s' if threads != 1 else ''}"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gpu(field: str) -> str | None:
    """Of the card that a run uses: the first of CUDA_VISIBLE_DEVICES."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not card:
        return None
    return _output("nvidia-smi", f"--id={card}", f"--query-gpu={field}", "--format=csv,noheader") or None


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(key) and ":" in line:
            return line.split(":", 1)[1].strip()
    return ""


def _cpu_name() -> str:
    name = _cpuinfo("model name") or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return name if name and name != "unknown" else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
