"""The command line of this stage: `python -m stages.m0_baseline --help`."""

from common.cli import stage_main
from stages.m0_baseline.engine import build

stage_main(__file__, build)
