"""The commands for several stages at once: `python -m stages arena` and `race`; of m1 and m6 if none is named."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer

import stages
from common.cli import run_app
from common.cli.options import fastest_dtype
from common.config import DEFAULT_MODEL
from common.errors import require

app = typer.Typer(
    help="Two or more stages side by side, on the same prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Names = Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="Two or more; without any, m1 and m6.")]
Model = Annotated[str, typer.Option(help="A name, a Hugging Face folder, a hub id, a *.gguf file, or random:...")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:0, ...")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32; auto: what the processor is fastest in.")]


@app.command()
def arena(
    names: Names = None,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "auto",
    port: Annotated[int, typer.Option(help="Of the page on 127.0.0.1; 0 takes a free one.")] = 8100,
) -> None:
    """A page on localhost: answers, steps and KV memory of each stage, live and side by side."""
    from common.arena import app as page
    from common.arena.race import open_sides
    from common.serving.listener import listen
    from common.serving.options import ServerOptions

    wanted = folders(names), arguments(model, device, dtype)
    with listen(ServerOptions(port=port)) as listener, _closed(open_sides(*wanted)) as sides:
        page.run(sides, listener)


@app.command()
def race(
    names: Names = None,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Dtype = "auto",
    preset: Annotated[
        str | None, typer.Option(help="many (default), long, shared, memory, samples, ...; all: one after the other.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Your own, instead of a preset; repeatable.")] = None,
    together: Annotated[bool, typer.Option("--together", help="At the same time, the cores shared out.")] = False,
) -> None:
    """The same in a terminal."""
    from common.arena.presets import find, presets_for
    from common.arena.race import open_sides
    from common.arena.terminal import show

    require(not prompt or preset in (None, "own"), "a preset or a prompt, not both: leave PRESET= or ASK= out")
    chosen = folders(names)
    numbers = [stages.number(folder) for folder in chosen]
    key = "own" if prompt else preset or "many"
    races = presets_for(numbers) if key == "all" else [find(key, numbers, prompt or ())]
    with _closed(open_sides(chosen, arguments(model, device, dtype))) as sides:
        for one in races:
            show(sides, one, "together" if together else "turns")


def folders(names: list[str] | None) -> list[str]:
    """Of the stages that were named; else m1, the first that remembers anything, and the last one whose weights are
    m1's: 4-bit ones would be another model."""
    return [stages.resolve(name) for name in names or ("m1", "m6")]


def arguments(model: str, device: str, dtype: str) -> list[str]:
    """Of each stage's command line."""
    dtype = fastest_dtype(device) if dtype == "auto" else dtype
    return ["--model", model, "--device", device, "--dtype", dtype]


@contextmanager
def _closed(sides: list[Any]) -> Generator[list[Any]]:
    """Closed at the end, whatever happens."""
    with ExitStack() as stack:
        for side in sides:
            stack.callback(side.close)
        yield sides


if __name__ == "__main__":
    run_app(app)
