"""The command line of this stage: `python -m stages.m5_chunked_prefill --help`."""

from common.cli import stage_main
from stages.m5_chunked_prefill.engine import build

stage_main(__file__, build)
