"""The command line of this stage: `python -m stages.m2_continuous_batching --help`."""

from common.cli import stage_main
from stages.m2_continuous_batching.engine import build

stage_main(__file__, build)
