"""Why a worker has no figures, in one line that a reader of the table understands."""

import re
import signal

import torch

OUT_OF_MEMORY = "out of memory"  # in every such message, so that tables and pictures can name it
_SIGNS = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
_WANTED = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+) (bytes|[KMGTP]iB)", re.IGNORECASE)


def of_error(error: Exception) -> str:
    """What an exception in the worker means."""
    text = " ".join(str(error).split())
    signs = isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _SIGNS)
    if signs or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"{OUT_OF_MEMORY}: {_wanted(text)}"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _wanted(text: str) -> str:
    found = _WANTED.search(text)
    if found is None:
        return text or "the system had no more to give"
    number, unit = found.groups()
    amount = f"{int(number) / 1e9:,.1f} GB" if unit == "bytes" else f"{number} {unit}"
    return f"there was no room for {amount} more"


def of_exit(status: int, log: str) -> str:
    """What it means that a worker ended with this status (negative: killed by that signal) and without a result."""
    if status == -signal.SIGKILL:
        reason = f"the system killed the worker: most likely {OUT_OF_MEMORY}"
    elif status < 0:
        known = -status in set(signal.Signals)
        reason = f"the worker was killed by {signal.Signals(-status).name if known else f'signal {-status}'}"
    else:
        reason = f"the worker ended with status {status} and no result"
    lines = log.strip().splitlines()
    return f"{reason}; its last words: {lines[-1].strip()}" if lines else reason
