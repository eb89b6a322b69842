"""The command that only this stage has: `quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from common.config import DEFAULT_MODEL, parse_device
from common.errors import unknown
from stages.m7_gptq.checkpoint.baselines import METHODS
from stages.m7_gptq.checkpoint.quantize import quantize
from stages.m7_gptq.settings import Settings

Model = Annotated[str, typer.Option(help="A name, a Hugging Face folder, a hub id, or a *.gguf file.")]


def add_commands(app: typer.Typer) -> None:
    """Add it to the commands that every stage has."""

    @app.command("quantize")
    def quantize_command(  # pyright: ignore[reportUnusedFunction]
        model: Model = DEFAULT_MODEL,
        bits: Annotated[int, typer.Option(help="4 or 8.")] = Settings.bits,
        group_size: Annotated[int | None, typer.Option(help="32 (nf4: 64), 64, 128, or -1: one per output.")] = None,
        sym: Annotated[bool, typer.Option(help="The zero point is the middle of the codes.")] = Settings.symmetric,
        desc_act: Annotated[bool, typer.Option(help="Columns by falling activation.")] = Settings.desc_act,
        search: Annotated[bool, typer.Option(help="Look for the best range of each grid.")] = Settings.search,
        damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal.")] = Settings.damping,
        method: Annotated[str, typer.Option(help="gptq, rtn (to nearest), or nf4 (QLoRA's).")] = Settings.method,
        text: Annotated[Path | None, typer.Option(help="Calibration text, instead of the stage's own.")] = None,
        out: Annotated[Path | None, typer.Option(help="The folder to write; without it: in the cache.")] = None,
        again: Annotated[bool, typer.Option("--again", help="Even if it was quantised before.")] = False,
        device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, ...")] = "auto",
    ) -> None:
        """Write a quantised checkpoint of a model: GPTQ takes some minutes for the embedded one on two cores."""
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        group_size = METHODS[method].group_size if group_size is None else group_size
        settings = METHODS[method](bits, group_size, sym, desc_act, search, damping)
        report = quantize(model, settings, out, text=text, device=parse_device(device), again=again)
        if any(report.losses):
            print("loss of each layer's projections (mean squared error of an output)")
            print("layer  " + "  ".join(f"{name:>12}" for name in report.losses[0]))
            for index, losses in enumerate(report.losses):
                print(f"{index:5d}  " + "  ".join(f"{losses[name]:12.3g}" for name in report.losses[0]))
        print(f"{'written to' if report.losses else 'already there:'} {report.folder}")
