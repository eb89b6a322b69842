"""The command line of this stage: `python -m stages.m7_gptq --help`."""

import typer

from common.cli.app import run_app
from stages.m7_gptq.cli import add_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
add_commands(app)
run_app(app)
