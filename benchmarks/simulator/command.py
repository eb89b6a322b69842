"""`python -m benchmarks simulate`: fit and check the prices of steps, or answer questions with them."""

from typing import Annotated, Any

import typer

from benchmarks import cli
from benchmarks.environment import ROOT, environment
from benchmarks.files import read_json, write_json
from benchmarks.sheet import print_table
from benchmarks.simulator import fit, pictures
from benchmarks.simulator.answers import ITL, SCHEMA, SHARE, TTFT, answers
from benchmarks.simulator.cost import Device
from benchmarks.simulator.replica import simulated_number
from common.config import DEFAULT_MODEL

LIMITS = ROOT / "reports/h200/gpu-limits.json"


def simulate(
    stage: Annotated[str, typer.Option(help="Whose scheduler and cache: m2 or later.")] = "m6",
    model: cli.Model = DEFAULT_MODEL,
    device: cli.Device = "cpu",
    fit_prices: Annotated[bool, typer.Option("--fit", help="Measure this machine; write cost_model.json.")] = False,
    quick: cli.Quick = False,
    out_dir: cli.Folder = cli.DEFAULT_FOLDER,
) -> None:
    """Real schedulers, caches and engine loops in virtual time; only the seconds of a step are a model's.

    Without --fit: goodput by chunk size and batch, replicas for a rate, routing policies, prefill and decode on devices
    of their own, and tensor parallelism; of a 32B model on GPUs as fast as a measured H200. No GPU is needed.
    """
    simulated_number(stage)  # refused before anything is written
    if fit_prices:
        found = dict[str, Any]()
        for found in fit.measure(stage, model, device, quick):
            write_json(out_dir / "cost_model.json", found)
        _show(found)
        return
    ceilings = read_json(LIMITS)["ceilings"]
    priced = Device(ceilings["copy_gb_per_s"] * 1e9, ceilings["matmul_tflop_per_s"] * 1e12)
    found = {"schema": SCHEMA, "environment": environment(), "config": {"preset": "quick" if quick else "full"}}
    found |= {"device": vars(priced), "objective": {"ttft": TTFT, "itl": ITL, "share": SHARE}}
    for name, rows in answers(stage, priced, quick):
        values = found | {"rows": [{"answer": name, **row} for row in rows]}
        write_json(out_dir / f"simulate-{name}.json", values)
        print(out_dir / f"simulate-{name}.json", pictures.draw(values, out_dir), sep="\n")


def _show(found: dict[str, Any]) -> None:
    rows = [
        (r["workload"], r["stage"], r["figure"], f"{r['measured']:.4g}", f"{r['predicted']:.4g}", f"{r['error']:+.0%}",
         "yes" if r["met"] else f"no, over {r['allowed']:.0%}")
        for r in found["rows"]
    ]  # fmt: skip
    headings = "workload", "stage", "figure", "measured", "predicted", "error", "met"
    caption = ", ".join(f"{name} {1e6 * price:.3g} µs" for name, price in found["prices"].items())
    print_table("predicted against measured", headings, rows, words=3, caption=caption)
