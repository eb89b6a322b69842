"""The commands that every stage has, and how a command line ends when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from common.cli.chat import chat
from common.cli.diff import show_diff
from common.cli.generate import demo, generate, read_prompts
from common.cli.options import with_options
from common.cli.serve import serve
from common.config import EngineConfig
from common.engine import Build
from common.errors import UserError
from common.sampling_params import SamplingParams

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


def stage_main(main_file: str, build: Build) -> NoReturn:
    """The whole of a stage's `__main__.py`: its folder, and how it builds its engine."""
    run_app(stage_app(Path(main_file).parent, build))


def stage_app(folder: Path, build: Build) -> typer.Typer:
    """The commands of the stage in `folder`."""
    name = folder.name.split("_")[0]
    number = int(name[1:])
    app = typer.Typer(
        help=f"Stage {name[1:]} ({folder.name}). Each command has a page of its own: `COMMAND --help`.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.command("demo")
    @with_options(number, max_tokens=48, max_num_seqs=4)
    def demo_command(config: EngineConfig, params: SamplingParams) -> None:
        """What this stage changes, a few answers, and what they took."""
        demo(folder, build, config, params)

    @app.command("generate")
    @with_options(number, max_tokens=128)
    def generate_command(
        config: EngineConfig,
        params: SamplingParams,
        prompts: Annotated[
            list[str] | None, typer.Argument(help="Prompts; without any: lines of standard input.")
        ] = None,
        token_ids: Annotated[
            bool, typer.Option("--token-ids", help='Prompts are token ids, such as "12, 7, 301", not text.')
        ] = False,
        json: Annotated[
            bool, typer.Option("--json", help="One line of JSON for each prompt, and nothing else.")
        ] = False,
    ) -> None:
        """Continue prompts. Text goes to standard output as it comes, figures to standard error."""
        generate(build, config, params, read_prompts(prompts, token_ids), json)

    @app.command("chat")
    @with_options(number, max_tokens=256, max_num_seqs=1)
    def chat_command(
        config: EngineConfig,
        params: SamplingParams,
        system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    ) -> None:
        """Ask questions, one a line. /reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C an answer."""
        chat(build, config, params, system)

    @app.command("serve")
    @with_options(number)
    def serve_command(
        config: EngineConfig,
        host: Annotated[str, typer.Option(help="Where it listens; 0.0.0.0 is everywhere.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
        api_key: Annotated[
            list[str] | None,
            typer.Option(envvar="FOLOVLLM_API_KEYS", help="Who has it may use the server; may be given several times."),
        ] = None,
        served_name: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
        max_queue: Annotated[int, typer.Option(help="Most answers that wait; then 429.")] = 256,
        max_body: Annotated[int, typer.Option(help="Most bytes of a request's body.")] = 1 << 20,
        max_prompt_tokens: Annotated[int | None, typer.Option(help="Most tokens of a prompt.")] = None,
        max_n: Annotated[int, typer.Option(help="Most answers to one request: prompts × n.")] = 16,
        max_tokens: Annotated[int | None, typer.Option(help="Most tokens of one answer.")] = None,
        drain: Annotated[float, typer.Option(help="Seconds that open requests have after SIGTERM.")] = 30.0,
        spans: Annotated[
            str | None, typer.Option(help="OpenTelemetry spans of each request: console, or otlp.")
        ] = None,
    ) -> None:
        """Answer OpenAI's clients over HTTP, until Ctrl-C."""
        serve(
            build,
            config,
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            served_name=served_name,
            max_queue=max_queue,
            max_body=max_body,
            max_prompt_tokens=max_prompt_tokens,
            max_n=max_n,
            max_tokens=max_tokens,
            drain=drain,
            spans=spans,
        )

    @app.command("play", hidden=True)
    @with_options(number)
    def play_command(config: EngineConfig) -> None:
        """One side of a race: `python -m stages arena` and `race` start it and talk to it."""
        from common.arena.player import play

        play(build, number, config)

    @app.command("bench", add_help_option=False, context_settings={"ignore_unknown_options": True})
    def bench_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        """Measure this stage alone; takes the options of `python -m benchmarks compare`."""
        command = ["-m", "benchmarks", "compare", "--stages", name, *(arguments or ())]
        sys.exit(_wait([sys.executable, *command]))

    @app.command("trace", add_help_option=False, context_settings={"ignore_unknown_options": True})
    def trace_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        """Draw what each step did and who held which memory; takes the options of `python -m benchmarks trace`."""
        sys.exit(_wait([sys.executable, "-m", "benchmarks", "trace", "--stage", name, *(arguments or ())]))

    @app.command("profile", add_help_option=False, context_settings={"ignore_unknown_options": True})
    def profile_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        """Show where the time of its steps goes; takes the options of `python -m benchmarks profile`."""
        sys.exit(_wait([sys.executable, "-m", "benchmarks", "profile", "--stage", name, *(arguments or ())]))

    @app.command("diff")
    def diff_command() -> None:
        """The files this stage rewrote, against the ones they replace: the lesson of the stage."""
        show_diff(folder)

    return app


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line. Whatever the user can fix is one line on standard error and exit status 2; Ctrl-C is 130."""
    try:
        status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
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
    """One line on standard error, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _wait(command: Sequence[str]) -> int:
    """Run a command to its end; Ctrl-C reaches it too, and how it ends then is its own business."""
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
