"""Requests that run step by step, and the picture that grows with them."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from common.engine import Engine
from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from common.text.prompts import Prompt
from common.watch.trace import StepRecord, StepTrace

BAR = 22  # characters of the longest bar: a line fits into 80 columns
IDLE = -1  # for `Ask.after`: when all requests before it have ended


@dataclass(frozen=True)
class Ask:
    """One request. Lengths in tokens; the first `shared` of the prompt are the same for all requests.
    after: the step before which it arrives; text: a question instead of made-up tokens, for a model that can chat."""

    prompt: int
    output: int
    after: int = 0
    shared: int = 0
    text: str = ""


class View:
    """A scene's lines: text, and where it has one a bar. own: is it the stage itself, not the one before it?
    scale: the longest bar so far, so that bars of both compare."""

    def __init__(self, engine: Engine, asks: Sequence[Ask], live: Live, own: bool = True, scale: float = 0.0) -> None:
        self.engine, self.asks, self.live, self.own = engine, asks, live, own
        self.lines: list[tuple[Text, float, str]] = []
        self.scale = scale
        self.peak: float | None = None  # MB, where a scene measures it
        self.trace = engine.trace = StepTrace(regions=True)
        self.outputs: dict[str, RequestOutput] = {}
        live.update(self)

    def steps(self) -> Iterator[StepRecord]:
        """Run the requests, named A, B, ...; yields each step when it is done, and then shows the lines."""
        waiting, seen = list(enumerate(self.asks)), -1
        while waiting or self.engine.has_unfinished:
            while waiting and (not self.engine.has_unfinished or 0 <= waiting[0][1].after <= seen + 1):
                number, ask = waiting.pop(0)
                params = SamplingParams(max_tokens=ask.output, ignore_eos=not ask.text)
                self.engine.add_request(self._prompt(number, ask), params, request_id=chr(ord("A") + number))
            self.outputs.update((output.request_id, output) for output in self.engine.step())
            for step in [step for step in self.trace.steps if step.index > seen]:
                seen = step.index
                yield step
                self.live.refresh()

    def _prompt(self, number: int, ask: Ask) -> Prompt:
        tokenizer, vocabulary = self.engine.tokenizer, self.engine.runner.model.config.vocab_size
        if ask.text and tokenizer is not None and tokenizer.chat_template is not None:
            return [{"role": "user", "content": ask.text}]
        seeds = [0] * ask.shared + [number + 1] * (ask.prompt - ask.shared)
        return [(7 * i + 131 * seed + 3) % vocabulary for i, seed in enumerate(seeds)]

    def add(self, text: Text | str, bar: float = 0.0, shown: str | None = None) -> None:
        """bar: seconds, unless `shown` says it in other words."""
        self.scale = max(self.scale, bar)
        self.lines.append((Text.assemble(text), bar, f"{bar * 1e3:.0f} ms" if shown is None and bar else shown or ""))

    def figures(self) -> dict[str, float | None]:
        """The arena's figures of the run, and its own `peak`: see `common.arena.figures`."""
        outputs, busy = self.outputs.values(), sum(step.duration for step in self.trace.steps)
        return {
            "speed": sum(len(output.token_ids) for output in outputs) / busy,
            "ttft": statistics.median(output.ttft or 0.0 for output in outputs),
            "gap": max((gap for output in outputs for gap in output.itl), default=None),
            "together": max(step.running for step in self.trace.steps),
            "time": busy,
            "peak": self.peak,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left = max((len(text.plain) for text, bar, _ in self.lines if bar), default=0)
        for text, bar, shown in self.lines:
            line = Text("  ", no_wrap=True, overflow="crop") + text
            if bar:
                line.pad_right(max(0, left - len(text.plain)))
                line += Text.assemble(f" {shown:>8} ", ("█" * max(1, round(BAR * bar / self.scale)), "cyan"))
            yield line
