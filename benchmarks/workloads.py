"""Workloads as data: one entry of `workloads.toml` each, here with the functions that make requests of its numbers."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.recipes import BenchRequest, Draw, Recipe, Span, chats, first, interference, poisson, uniform
from common.errors import unknown


@dataclass(frozen=True)
class Size:
    """A workload's numbers for one kind of machine.

    kv_tokens: what the KV cache may hold, in tokens, the same for every stage; None: max_num_seqs * max_model_len.
    options: further engine options; a stage that does not have one runs without it.
    hit_rate: percent of the prompt tokens that a warm prefix cache can serve, where the workload is about that.
    """

    recipe: Recipe
    max_num_seqs: int
    max_model_len: int
    kv_tokens: int | None = None
    options: Mapping[str, int | float | str] = field(default_factory=dict[str, int | float | str])
    hit_rate: int | None = None

    def requests(self, vocab_size: int, run: int = 0) -> list[BenchRequest]:
        return self.recipe(Draw(vocab_size, run))

    @property
    def kv_budget_tokens(self) -> int:
        return self.kv_tokens or self.max_num_seqs * self.max_model_len


@dataclass(frozen=True)
class Workload:
    """One question put to all engines.

    sizes: `cpu`, `gpu`, and `quick` for tests. variants: the points of a sweep, by name; run only with --sweep, and
    only where the point has numbers for the machine.
    m0_runs: the workload that m0 runs in this one's place, because this one would take it too long; "": this one.
    m0_variants: how many of the variants, from the first on, m0 runs.
    variants_from: the first stage that runs the variants, where they vary what earlier ones do not have.
    probed: one more run, after the timed ones, measures the time in attention and the memory of activations.
    columns: what the last columns of its table tell, of `benchmarks.table.LAST_COLUMNS`.
    stages_only: requests wait for tokens of others, which peers do not tell while they run.
    ladder: all stages are compared on it, those with ways to execute a plan twice (see `benchmarks.execution`).
    """

    name: str
    description: str
    claim: str
    sizes: Mapping[str, Size]
    variants: Mapping[str, Mapping[str, Size]] = field(default_factory=dict[str, Mapping[str, Size]])
    m0_runs: str = "ladder"
    m0_variants: int | None = None
    variants_from: int = 0
    probed: bool = False
    columns: str = "kv"
    stages_only: bool = False
    ladder: bool = False
    repeats: int = 3

    def variants_for(self, preset: str) -> list[str]:
        return [name for name, sizes in self.variants.items() if preset in sizes]


Options = Mapping[str, int | float | str]


def ragged(
    count: int, inputs: Span, outputs: Span, max_num_seqs: int, max_model_len: int, long_outputs: Span = (0, 0),
    long_share: float = 0.0, kv_tokens: int | None = None, options: Options | None = None,
) -> Size:  # fmt: skip
    """Requests of many lengths, all submitted at once."""
    recipe = uniform(count, inputs, outputs, long_outputs, long_share)
    return Size(recipe, max_num_seqs, max_model_len, kv_tokens, options or {})


def alike(count: int, prompt: int, output: int, max_model_len: int) -> Size:
    """Requests of the same lengths, all of which run at once."""
    return ragged(count, (prompt, prompt), (output, output), count, max_model_len)


def cut(of: Size, count: int, longest_output: int, max_num_seqs: int) -> Size:
    """The first requests of another workload, their outputs cut."""
    return replace(of, recipe=first(of.recipe, count, longest_output), max_num_seqs=max_num_seqs)


def arriving(of: Size, per_second: float) -> Size:
    """The requests of another workload, arriving at random."""
    return replace(of, recipe=poisson(of.recipe, per_second))


def one_prompt(length: int, output: int = 16) -> Size:
    """One long prompt and a short answer, in an engine that holds just that, in blocks of up to 256 tokens."""
    total = length + output
    return ragged(1, (length, length), (output, output), 1, total, kv_tokens=-(-total // 256) * 256)


def among_decodes(
    steady: int, rounds: int, every: int, prompt: int, long_prompt: int, other_outputs: int,
    chunk: int | str | None = None,
) -> Size:  # fmt: skip
    """Rows and blocks of up to 256 tokens for all requests at once: slow prefills pile up, and none is preempted.
    One step may prefill a long prompt and the short one behind it."""
    recipe = interference(steady, rounds, every, prompt, long_prompt, other_outputs)
    totals = [r.prompt_length + r.max_tokens for r in recipe(Draw(vocab_size=1))]
    kv_tokens = sum(-(-total // 256) * 256 for total in totals)
    options: dict[str, int | str] = {"max_num_batched_tokens": 2 * long_prompt}
    options |= {} if chunk is None else {"prefill_chunk_size": chunk}
    return Size(recipe, len(totals), max(totals), kv_tokens, options)


LOAD = 0.5
"""Share of the prefill's speed that prompts ask for: a first token waits for its own prefill, and not in a queue."""
HIT_RATES = {95: None, 0: 0.0, 50: 0.5, 80: 0.8}
"""Percent: the share of a prompt that it has in common with others; None: all but the new message."""


def on_one_beginning(
    count: int, turns: int, prefix: int, messages: Span, max_num_seqs: int, prefilled_per_second: float,
    outputs: Span = (16, 32), hit_rate: int = 95,
) -> Size:  # fmt: skip
    """Chats paced by `LOAD`, over the mean length of a prompt."""
    message, grows = sum(messages) / 2, (sum(messages) + sum(outputs)) / 2
    mean = prefix + message + grows * (turns - 1) / 2
    longest = prefix + turns * (messages[1] + outputs[1])
    gap = mean / (LOAD * prefilled_per_second)
    recipe = chats(count, turns, prefix, messages, outputs, gap, HIT_RATES[hit_rate])
    return Size(recipe, max_num_seqs, -(-longest // 64) * 64, hit_rate=hit_rate)


MAKERS: dict[str, Callable[..., Size]] = {
    make.__name__: make for make in (ragged, alike, cut, arriving, one_prompt, among_decodes, on_one_beginning)
}
PRESETS = ("cpu", "gpu", "quick")


def _read() -> dict[str, Workload]:
    """All of workloads.toml, in its order."""
    found: dict[str, Workload] = {}
    entries: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for name, entry in entries.items():
        make, of, sweep = MAKERS[entry.pop("make")], entry.pop("of", None), entry.pop("sweep", {})
        numbers = {preset: entry.pop(preset) for preset in PRESETS}
        if of is not None:
            numbers = {preset: {"of": found[of].sizes[preset], **given} for preset, given in numbers.items()}
        sizes = {preset: make(**given) for preset, given in numbers.items()}
        variants = {
            point: {preset: make(**{**numbers[preset], **given}) for preset, given in changes.items()}
            for point, changes in sweep.items()
        }
        found[name] = Workload(name, sizes=sizes, variants=variants, **entry)
    return found


WORKLOADS = _read()


def find(name: str) -> Workload:
    """The workload of that name; `UserError` with the list of names otherwise."""
    if name not in WORKLOADS:
        raise unknown("workload", name, WORKLOADS)
    return WORKLOADS[name]


def preset_of(device: str, quick: bool) -> str:
    """Which numbers of a workload are for this machine: `cpu`, `gpu`, or `quick`, for tests."""
    return "quick" if quick else "gpu" if device.startswith("cuda") else "cpu"


def find_size(workload: str, variant: str | None, preset: str) -> Size:
    """The numbers of a workload, or of one point of its sweep, for `cpu`, `gpu` or `quick`."""
    entry = find(workload)
    return (entry.variants[variant] if variant else entry.sizes)[preset]
