"""The command line of this stage: `python -m stages.m7_gptq --help`."""

from pathlib import Path

from common.cli import run_app, stage_app
from stages.m7_gptq.checkpoint.cli import add_commands
from stages.m7_gptq.engine import build

app = stage_app(Path(__file__).parent, build)
add_commands(app)
run_app(app)
