"""The command line of a stage: `python -m stages.m1_kv_cache generate | chat | demo | bench | diff`."""

from common.cli.app import run_app, stage_app, stage_main

__all__ = ["run_app", "stage_app", "stage_main"]
