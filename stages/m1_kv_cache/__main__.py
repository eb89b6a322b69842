"""The command line of this stage: `python -m stages.m1_kv_cache --help`."""

from common.cli import stage_main
from stages.m1_kv_cache.engine import build

stage_main(__file__, build)
