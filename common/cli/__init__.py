"""The command line of a stage: `python -m stages.m1_kv_cache generate | chat | serve | demo | bench | ...`."""

from common.cli.app import run_app, stage_app, stage_main

__all__ = ["run_app", "stage_app", "stage_main"]
