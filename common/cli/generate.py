"""`generate`: prompts in, text as it comes, and what it took."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console

from common.config import EngineConfig
from common.engine import Build, Engine
from common.errors import UserError
from common.execution.cores import in_own_thread
from common.models.load import open_source
from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from common.text.prompts import Prompt

Write = Callable[[str], object]


@contextmanager
def ready_engine(build: Build, config: EngineConfig, prompt: int = 8) -> Generator[Engine, None, None]:
    """An engine after its first steps, which are slow: libraries choose their kernels in them. prompt: its length."""
    open_source(config.model, config.torch_device, progress=None)  # downloads or converts, with a bar of its own
    engine = build(config)  # with bars of its own: loading, and m7's quantising
    with Console(stderr=True, quiet=not sys.stderr.isatty()).status("warming up"):
        length = min(prompt, engine.max_model_len - 2)
        engine.generate([[1] * max(1, length)], SamplingParams(max_tokens=2 if length > 0 else 1, ignore_eos=True))
        engine.reset_prefix_cache()
        engine.reset_metrics()
    with engine:
        yield engine


@contextmanager
def loaded_engine(build: Build, config: EngineConfig) -> Generator[Engine, None, None]:
    """`ready_engine` for lasting service, with its steps in another thread than this one: see `in_own_thread`."""
    # PyTorch and oneDNN each keep a compiled product for the last 1,024 lengths of prompts in bf16: most of a gigabyte.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    with ExitStack() as stack:
        yield in_own_thread(lambda: stack.enter_context(ready_engine(build, config)))


def run(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, write: Write) -> list[RequestOutput]:
    """Run prompts together and write the output of each as it comes, in input order, each with a line break.

    A prompt's output waits while an earlier one is being written. An exception, as of Ctrl-C, aborts the requests.
    """
    ids: list[str] = []
    latest: dict[str, RequestOutput] = {}
    current, shown = 0, 0
    try:
        for prompt in prompts:
            ids.append(engine.add_request(prompt, params))
        while engine.has_unfinished:
            latest.update((output.request_id, output) for output in engine.step())
            while current < len(ids) and ids[current] in latest:
                output = latest[ids[current]]
                text = output.outputs[0].readable
                write(text[shown:])
                shown = len(text)
                if not output.finished:
                    break
                write("\n")
                for sample in output.outputs[1:]:
                    write(f"{sample.readable}\n")
                current, shown = current + 1, 0
        return [latest[request_id] for request_id in ids]
    finally:
        for request_id in ids:
            engine.abort(request_id)


def figures(engine: Engine, outputs: Sequence[RequestOutput]) -> str:
    """One line. TTFT: time to the first token; TPOT: for each further one; medians of several."""
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    begin = min(output.arrival_time for output in outputs)
    seconds = max(output.arrival_time + (output.e2e or 0.0) for output in outputs) - begin
    parts = [f"{tokens} tokens in {seconds:.2f} s", f"{tokens / seconds:.1f} tokens/s"]
    for name, values in (("TTFT", [o.ttft for o in outputs]), ("TPOT", [o.tpot for o in outputs])):
        known = [value for value in values if value is not None]
        if known:
            parts.append(f"{name} {1000 * statistics.median(known):.1f} ms")
    dtype = str(engine.config.torch_dtype).removeprefix("torch.")
    parts.append(f"{engine.stage}, {dtype}, {engine.config.torch_device}")
    return " · ".join(parts)


def show_choices(engine: Engine) -> None:
    """One line on standard error about the engine's own choices and their reasons; nothing if it had none."""
    chosen = engine.metrics()["attention"]
    if chosen is not None:
        sys.stdout.flush()
        Console(stderr=True).print(chosen, style="dim", highlight=False, markup=False, soft_wrap=True)


def read_prompts(arguments: Sequence[str] | None, token_ids: bool) -> list[Prompt]:
    """Prompts of the command line, else lines of standard input; with `token_ids`, each is parsed as token ids."""
    texts = list(arguments or ())
    if not texts:
        if sys.stdin.isatty():
            raise UserError('give a prompt, as in: generate "The capital of France is", or pipe some in, one a line')
        texts = [line for line in input_lines() if line.strip()]
    if not texts:
        raise UserError("standard input holds no prompt: give one a line")
    return [parse_token_ids(text) for text in texts] if token_ids else list(texts)


def parse_token_ids(text: str) -> list[int]:
    """`'12, 7 301'` to `[12, 7, 301]`."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f'{text!r} is no list of token ids: write whole numbers, such as "12, 7, 301"') from None


def input_lines() -> Iterator[str]:
    """Lines of standard input, without their line breaks."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text: convert it first") from None


def generate(
    build: Build, config: EngineConfig, params: SamplingParams, prompts: Sequence[Prompt], as_json: bool
) -> None:
    with ready_engine(build, config) as engine:
        if engine.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
            hint = 'give token ids, as in: generate --token-ids "12, 7, 301"'
            raise UserError(f"{config.model} has no tokenizer: {hint}")
        if as_json:
            for output in run(engine, prompts, params, lambda text: None):
                print(json.dumps(to_json(output), ensure_ascii=False))
            return
        outputs = run(engine, prompts, params, write_out)
        Console(stderr=True).print(figures(engine, outputs), style="dim", highlight=False, soft_wrap=True)
        show_choices(engine)


def write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def to_json(output: RequestOutput) -> dict[str, object]:
    """A result as `generate --json` prints it; times in seconds."""
    fields: dict[str, object] = {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "ttft_s": output.ttft,
        "tpot_s": output.tpot,
        "e2e_s": output.e2e,
    }
    if output.logprobs is not None:
        fields["logprobs"] = output.logprobs
    if len(output.outputs) > 1:
        fields["samples"] = [{"text": sample.text, "token_ids": sample.token_ids} for sample in output.outputs]
    return fields
