"""The command line of this stage: `python -m stages.m6_prefix_caching --help`."""

from common.cli import stage_main
from stages.m6_prefix_caching.engine import build

stage_main(__file__, build)
