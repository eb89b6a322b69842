"""What all stages share. The public names import from here."""

# First, before anything imports torch: it bounds how long idle threads spin.
from common.execution import threads  # noqa: F401  # pyright: ignore[reportUnusedImport]  # isort: skip

from common.config import EngineConfig
from common.engine import Engine
from common.errors import UserError
from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import SamplingParams

__all__ = ["CompletionOutput", "Engine", "EngineConfig", "RequestOutput", "SamplingParams", "UserError"]
