"""What all stages share. The public names import from here."""

from common.config import EngineConfig
from common.engine import Engine
from common.errors import UserError
from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import SamplingParams

__all__ = ["CompletionOutput", "Engine", "EngineConfig", "RequestOutput", "SamplingParams", "UserError"]
