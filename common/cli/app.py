"""The commands that every stage has, and how errors end them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from common.cli.chat import chat
from common.cli.demo import demo
from common.cli.diff import show_diff
from common.cli.generate import generate, loaded_engine, read_prompts
from common.cli.options import with_options
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError
from common.execution.parallel.start import follows, on_ranks
from common.sampling_params import SamplingParams
from common.serving.options import ServerOptions

EXTRA = dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve") | {
    "opentelemetry": "spans",
    "ray": "scale",
}
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


def stage_main(main_file: str, build: Build) -> NoReturn:
    run_app(stage_app(Path(main_file).parent, build))


def stage_app(folder: Path, build: Build) -> typer.Typer:
    name = folder.name.split("_")[0]
    number, build = int(name[1:]), on_ranks(build)
    app = typer.Typer(
        help=f"Stage {name[1:]} ({folder.name}). Run COMMAND --help for details.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.command("demo")
    @with_options(number, **({"dtype": "bf16"} if number == 7 else {}))  # in float32, 4 bits save no bytes
    def demo_command(config: EngineConfig) -> None:
        """This stage's idea at work on a few requests, next to the stage before it; about 20 seconds."""
        demo(folder, build, config)

    @app.command("generate")
    @with_options(number, max_tokens=128)
    def generate_command(
        config: EngineConfig,
        params: SamplingParams,
        prompts: Annotated[list[str] | None, typer.Argument(help="Default: lines of standard input.")] = None,
        token_ids: Annotated[bool, typer.Option("--token-ids", help='Prompts are ids, as in "12, 7, 301".')] = False,
        json: Annotated[bool, typer.Option("--json", help="Nothing but a line of JSON for each prompt.")] = False,
    ) -> None:
        """Continue prompts. Text goes to standard output as it comes, figures to standard error."""
        generate(build, config, params, read_prompts(prompts, token_ids), json)

    @app.command("chat")
    @with_options(number, max_tokens=256, max_num_seqs=1)
    def chat_command(
        config: EngineConfig,
        params: SamplingParams,
        system: Annotated[str | None, typer.Option(help="The system prompt of the conversation.")] = None,
    ) -> None:
        """Ask questions, one a line. /reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C an answer."""
        chat(build, config, params, system)

    @app.command("serve")
    @with_options(number)
    def serve_command(
        config: EngineConfig,
        server: ServerOptions,
        api_key: Annotated[
            list[str] | None, typer.Option(envvar="FOLOVLLM_API_KEYS", help="That requests need; repeatable.")
        ] = None,
    ) -> None:
        """Answer OpenAI's clients over HTTP, until Ctrl-C."""
        serve(build, config, replace(server, api_keys=tuple(api_key or ())))

    @app.command("batch")
    @with_options(number)
    def batch_command(
        config: EngineConfig,
        source: Annotated[Path, typer.Argument(metavar="REQUESTS", help="Lines of OpenAI's batch format.")],
        target: Annotated[Path, typer.Argument(metavar="ANSWERS", help="Lines that it has are not asked again.")],
        served_name: Annotated[str | None, typer.Option(help="The model's name in the requests.")] = None,
        ray: Annotated[bool, typer.Option("--ray", help="On the Ray cluster of RAY_ADDRESS, or here.")] = False,
    ) -> None:
        """Answer a file of requests, in order; the same command goes on where it was stopped."""
        from common.cli.batch import answers, batch

        if ray:
            from common.scale.batches import answers
        batch(source, target, partial(answers, build, config, served_name))

    @app.command("play", hidden=True)
    @with_options(number)
    def play_command(config: EngineConfig) -> None:
        """One side of a race: `python -m stages arena` and `race` start it and talk to it."""
        from common.arena.player import play

        play(build, number, config)

    def add_benchmark(verb: str, text: str, *command: str) -> None:
        """A command that the harness carries out: it takes the options of `python -m benchmarks ...`."""

        @app.command(verb, help=text, add_help_option=False, context_settings={"ignore_unknown_options": True})
        def benchmark(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
            options = [*command, name, *(arguments or ())]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *options])  # becomes the harness

    takes = "takes the options of `python -m benchmarks"
    add_benchmark("bench", f"Measure this stage alone; {takes} compare`.", "compare", "--stages")
    add_benchmark("trace", f"Draw each step and the memory that requests hold; {takes} trace`.", "trace", "--stage")
    add_benchmark("profile", f"Show where the time of its steps goes; {takes} profile`.", "profile", "--stage")

    @app.command("diff")
    def diff_command() -> None:
        """The files this stage rewrote, against the ones they replace: the lesson of the stage."""
        show_diff(folder)

    return app


def serve(build: Build, config: EngineConfig, options: ServerOptions) -> None:
    """Returns after SIGTERM, when all requests have been answered; Ctrl-C then raises `KeyboardInterrupt`."""
    if follows():
        build(config)  # ends with rank 0's engine
    if options.replicas > 1:
        from common.scale.serve import run

        return run(f"{build.__module__}:{build.__name__}", config, options)
    from common.serving import server
    from common.serving.listener import listen
    from common.serving.spans import spans_to

    with (
        listen(options) as listener,  # bad options are refused before a model is loaded
        spans_to(options.spans) as spans,
        loaded_engine(build, config) as engine,
    ):
        server.run(engine, options, listener, spans)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line. An error that the user can fix is one line on standard error and status 2; Ctrl-C is 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        if (extra := EXTRA.get(str(error.name).split(".")[0])) is None:
            raise
        fail(f"this needs {error.name}, which is not installed: pip install '.[{extra}]'")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        message = getattr(error, "format_message", None)  # what typer raises for arguments that it does not understand
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message())
            sys.exit(0)
        fail(f"{message()} See --help.")
    if status == INTERRUPTED:  # newer versions of typer return it, older ones raise Abort
        print("interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
