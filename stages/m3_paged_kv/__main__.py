"""The command line of this stage: `python -m stages.m3_paged_kv --help`."""

from common.cli import stage_main
from stages.m3_paged_kv.engine import build

stage_main(__file__, build)
