"""`chat`: a conversation in the terminal, or questions from a pipe."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console

from common.cli.generate import figures, input_lines, ready_engine, run, write_out
from common.config import EngineConfig
from common.engine import Build, Engine
from common.errors import UserError
from common.sampling_params import SamplingParams
from common.text.chat_template import pick
from common.text.tokenizer import Tokenizer

COMMANDS = "/reset forgets the conversation, /quit ends it"


@dataclass
class Conversation:
    """The messages so far: questions, each with its answer. The oldest are dropped when the next prompt would not fit.

    room: most tokens of a prompt, so that a whole answer still fits after it.
    """

    tokenizer: Tokenizer
    room: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def prompt(self, question: str) -> list[int]:
        """Token ids of the conversation with one more question; `UserError` if that alone is too long."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            token_ids = self.tokenizer.chat([*system, *self.messages, {"role": "user", "content": question}])
            if len(token_ids) <= self.room:
                return token_ids
            if not self.messages:
                sizes = f"the question has {len(token_ids)} tokens, and {self.room} fit next to the answer"
                raise UserError(f"{sizes}: shorten it, lower --max-tokens or raise --max-model-len")
            del self.messages[:2]

    def add(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat(build: Build, config: EngineConfig, params: SamplingParams, system: str | None) -> None:
    """Answer one question per line, until the input ends; in a terminal, an error or Ctrl-C ends only one answer."""
    console = Console(stderr=True, highlight=False)
    interactive = sys.stdin.isatty()
    with ready_engine(build, config) as engine:
        conversation = Conversation(_tokenizer(engine), engine.max_model_len - params.max_tokens, system)
        if interactive:
            console.print(f"{config.model} on {engine.stage}. {COMMANDS}.", style="dim", soft_wrap=True)
        for question in _questions(interactive):
            if question == "/quit":
                return
            if question == "/reset":
                conversation.messages.clear()
                console.print("forgotten", style="dim")
            elif question.startswith("/"):
                console.print(f"{question.split()[0]} is no command: {COMMANDS}.", style="dim", markup=False)
            elif question:
                try:
                    outputs = run(engine, [conversation.prompt(question)], params, write_out)
                    conversation.add(question, outputs[0].text)
                    console.print(figures(engine, outputs), style="dim", soft_wrap=True)
                except (UserError, KeyboardInterrupt) as error:
                    if not interactive:
                        raise
                    console.print(f"\n{str(error) or 'stopped'}", style="dim", markup=False)


def _tokenizer(engine: Engine) -> Tokenizer:
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise UserError(f"{engine.config.model} has no tokenizer: chat needs a model that has one")
    pick(tokenizer.chat_template)  # an error now, not at the first question
    return tokenizer


def _questions(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.strip() for line in input_lines())
        return
    with contextlib.suppress(ImportError):  # arrow keys and history in input(), where the platform has them
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
