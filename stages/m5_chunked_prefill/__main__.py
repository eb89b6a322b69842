"""The command line of this stage: `python -m stages.m4_flash_attention --help`."""

from common.cli import stage_main
from stages.m4_flash_attention.engine import build

stage_main(__file__, build)
