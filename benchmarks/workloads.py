"""Workloads as data. Adding one is one entry in `WORKLOADS`, and a recipe (`benchmarks.recipes`) where none fits.

Changing a workload makes old figures incomparable: do it only for a reason that the commit states.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    m0_runs: the workload that m0 runs in this one's place, because this one would take it too long.
    m0_variants: how many of the variants, from the first on, m0 runs.
    variants_from: the first stage that runs the variants, where they vary what earlier ones do not have.
    probed: one more run, after the timed ones, measures the time in attention and the memory of activations.
    columns: what the last columns of its table tell: `kv`, `probe`, `stalls` or `prefix` (see `benchmarks.table`).
    stages_only: requests wait for tokens of others, which peers do not tell while they run.
    ladder: all stages are compared on it, those with ways to execute a plan twice (see `benchmarks.execution`).
    """

    name: str
    description: str
    claim: str
    sizes: Mapping[str, Size]
    variants: Mapping[str, Mapping[str, Size]] = field(default_factory=dict[str, Mapping[str, Size]])
    m0_runs: str | None = "ladder"
    m0_variants: int | None = None
    variants_from: int = 0
    probed: bool = False
    columns: str = "kv"
    stages_only: bool = False
    ladder: bool = False
    repeats: int = 3

    def variants_for(self, preset: str) -> list[str]:
        return [name for name, sizes in self.variants.items() if preset in sizes]


_MIXED = {
    "cpu": Size(uniform(48, (16, 96), (4, 32), (160, 224), 0.15), 16, 512),
    "gpu": Size(uniform(256, (100, 1024), (16, 128), (700, 1000), 0.15), 64, 2048),
    "quick": Size(uniform(8, (4, 12), (2, 4), (10, 14), 0.25), 4, 64),
}
_PRESSURE = {
    "cpu": Size(uniform(64, (32, 128), (32, 128)), 64, 2048, kv_tokens=4 * 2048),
    "gpu": Size(uniform(256, (64, 256), (64, 256)), 256, 4096, kv_tokens=16 * 4096),
    "quick": Size(uniform(8, (8, 16), (4, 12)), 8, 128, kv_tokens=2 * 128),
}
_SWAP_SPACE = 2**30  # bytes: more than the preempted requests of `memory_pressure` hold at a time
_ARRIVALS_PER_SECOND = {"cpu": 2.0, "gpu": 20.0, "quick": 50.0}


def _alike(count: int, prompt: int, output: int, max_model_len: int) -> Size:
    """Requests of the same lengths, all of which run at once."""
    return Size(uniform(count, (prompt, prompt), (output, output)), count, max_model_len)


def _prompt(length: int, output: int = 16) -> Size:
    """One long prompt and a short answer, in an engine that holds just that, in blocks of up to 256 tokens."""
    total = length + output
    return Size(uniform(1, (length, length), (output, output)), 1, total, kv_tokens=-(-total // 256) * 256)


_LENGTHS = {
    **{n: {"cpu": _prompt(n), "gpu": _prompt(n), "quick": _prompt(n // 32, 4)} for n in (512, 1024, 2048, 4096)},
    8192: {"cpu": _prompt(8192 - 16), "gpu": _prompt(8192)},  # the embedded model ends at position 8192
    16384: {"gpu": _prompt(16384)},
    32768: {"gpu": _prompt(32768)},
}
_HEADLINE = {"cpu": 4096, "gpu": 16384, "quick": 4096}


def _interference(steady: int, rounds: int, every: int, prompt: int, long_prompt: int, other_outputs: int) -> Size:
    """Rows and blocks of up to 256 tokens for all requests at once: slow prefills pile up, and none is preempted.
    One step may prefill a long prompt and the short one behind it."""
    recipe = interference(steady, rounds, every, prompt, long_prompt, other_outputs)
    totals = [r.prompt_length + r.max_tokens for r in recipe(Draw(vocab_size=1))]
    kv_tokens = sum(-(-total // 256) * 256 for total in totals)
    return Size(recipe, len(totals), max(totals), kv_tokens, {"max_num_batched_tokens": 2 * long_prompt})


_INTERFERENCE = {
    "cpu": _interference(8, 8, 32, 32, 2048, 16),
    "gpu": _interference(8, 16, 32, 32, 8192, 16),
    "quick": _interference(3, 2, 4, 8, 64, 2),
}

_CHUNKS = {
    "cpu": (32, 64, 128, 256, 512, 1024, "auto"),
    "gpu": (256, 512, 1024, 2048, "auto"),
    "quick": (32, 64, 128, 256, 512, 1024, "auto"),
}

PREFILL_TOKENS_PER_SECOND = {"cpu": 2_000, "gpu": 160_000, "quick": 20_000}
"""What an engine without a prefix cache prefills: SmolLM2-135M in bf16 on two CPU threads, Qwen3-0.6B on an H100. Only
the pace of the prompts comes from it."""
LOAD = 0.5
"""Share of that speed which prompts ask for: the first token then waits for its own prefill and not in a queue."""
HIT_RATES = {95: None, 0: 0.0, 50: 0.5, 80: 0.8}
"""Percent: the share of a prompt that it has in common with others; None: all but the new message."""


def _chats(
    preset: str, count: int, turns: int, prefix: int, messages: Span, rows: int, hit_rate: int, outputs: Span = (16, 32)
) -> Size:
    """Paced by `LOAD`, over the mean length of a prompt."""
    message, grows = sum(messages) / 2, (sum(messages) + sum(outputs)) / 2
    mean = prefix + message + grows * (turns - 1) / 2
    longest = prefix + turns * (messages[1] + outputs[1])
    gap = mean / (LOAD * PREFILL_TOKENS_PER_SECOND[preset])
    recipe = chats(count, turns, prefix, messages, outputs, gap, HIT_RATES[hit_rate])
    return Size(recipe, rows, -(-longest // 64) * 64, hit_rate=hit_rate)


def _by_hit_rate(turns: Mapping[str, tuple[int, int]]) -> dict[int, dict[str, Size]]:
    """The numbers of each hit rate and preset. turns: how many chats, and turns of each."""
    return {
        rate: {
            "cpu": _chats("cpu", *turns["cpu"], 1024, (38, 70), 8, rate),
            "gpu": _chats("gpu", *turns["gpu"], 4096, (152, 280), 16, rate),
            "quick": _chats("quick", *turns["quick"], 96, (4, 6), 2, rate, (2, 3)),
        }
        for rate in HIT_RATES
    }


_QUESTIONS = _by_hit_rate({"cpu": (24, 1), "gpu": (128, 1), "quick": (4, 1)})
_CHATS = _by_hit_rate({"cpu": (4, 6), "gpu": (8, 8), "quick": (2, 3)})
_BEST = 95


# Of each: its name, what it does, the claim that it tests, and its numbers.
_ALL = (
    Workload("single", "one request: 128 tokens in, 128 out",
             "With a KV cache the cost of a new token no longer grows with the sequence (m1 over m0).",
             {"cpu": _alike(1, 128, 128, 512), "gpu": _alike(1, 128, 128, 512), "quick": _alike(1, 8, 8, 64)},
             variants={f"output={n}": {"cpu": _alike(1, 128, n, 2048), "gpu": _alike(1, 128, n, 2048),
                                       "quick": _alike(1, 8, n // 16, 128)} for n in (64, 128, 256, 512, 1024)},
             m0_runs=None, m0_variants=3),
    Workload("mixed", "ragged inputs and outputs, far more requests than rows, all submitted at once",
             "Requests that join and leave at every step give 3-5 times the throughput (m2 over m1).",
             _MIXED, ladder=True),
    Workload("decode",
             "a full batch that starts and ends together: 16 requests, 32 in, 128 out (GPU: 64, 128 in, 512 out)",
             "Decode attention that reads the blocks in place takes less time than one that gathers them (m4 over m3).",
             {"cpu": _alike(16, 32, 128, 512), "gpu": _alike(64, 128, 512, 1024), "quick": _alike(4, 8, 6, 64)}),
    Workload("ladder", "the first 12 requests of mixed, outputs cut to 48: short enough for every stage, m0 included",
             "Each stage is faster than the one before, or says why not.",
             {"cpu": Size(first(_MIXED["cpu"].recipe, 12, 48), 4, 512),
              "gpu": Size(first(_MIXED["gpu"].recipe, 12, 48), 4, 2048),
              "quick": Size(first(_MIXED["quick"].recipe, 4, 6), 2, 64)},
             m0_runs=None, ladder=True),
    Workload("arrivals", "mixed, arriving at random (Poisson): 2 requests a second on a CPU, 20 on a GPU",
             "A request does not wait for the longest one of another batch (m2 over m1).",
             {p: replace(size, recipe=poisson(size.recipe, _ARRIVALS_PER_SECOND[p])) for p, size in _MIXED.items()}),
    Workload("memory_pressure",
             "requests far shorter than max_model_len, in the memory of 4 requests of max_model_len (GPU: 16)",
             "Paging runs twice as many requests or more in the same bytes, which it fills to over 90 % (m3 over m2).",
             _PRESSURE,
             variants={f"block_size={n}": {p: replace(size, options={"block_size": n}) for p, size in _PRESSURE.items()}
                       for n in (1, 4, 8, 16, 32, 64, 128, 256)} |
                      {f"half_memory={how}": {
                          p: replace(size, kv_tokens=size.kv_budget_tokens // 2, options={"swap_space": space})
                          for p, size in _PRESSURE.items()
                       } for how, space in (("recompute", 0), ("swap", _SWAP_SPACE))},
             variants_from=3),
    Workload("long_context", "one long prompt, 16 tokens out: 4096 tokens in on a CPU, 16384 on a GPU",
             "Attention that never writes the score matrix takes less time, and memory that grows with the length, not "
             "with its square (m4 over m3).",
             {preset: _LENGTHS[length][preset] for preset, length in _HEADLINE.items()},
             variants={f"prompt={length}": {p: size for p, size in sizes.items() if _HEADLINE[p] != length}
                       for length, sizes in _LENGTHS.items()},
             m0_variants=1, probed=True, columns="probe"),
    Workload("interference",
             "8 requests that decode; each time they have made 32 tokens, a prompt of 2048 (GPU: 8192) and a short one",
             "Those that run no longer stall behind a long prompt: half the p99 time between tokens or less, at about "
             "equal throughput; the long prompt pays (m5 over m4).",
             _INTERFERENCE,
             variants={f"chunk={chunk}": {
                 preset: replace(size, options={**size.options, "prefill_chunk_size": chunk})
                 for preset, size in _INTERFERENCE.items() if chunk in _CHUNKS[preset]
             } for chunk in (32, 64, 128, 256, 512, 1024, 2048, "auto")},
             variants_from=5, columns="stalls", stages_only=True),
    Workload("shared_prefix",
             "24 questions (GPU: 128) behind one system prompt of 1024 tokens (GPU: 4096), 95 % of each prompt",
             "A beginning that is in the cache is not computed again: TTFT is 3-10 times shorter, and without hits "
             "hardly longer (m6 over m5).",
             _QUESTIONS[_BEST],
             variants={f"hit_rate={rate}": sizes for rate, sizes in _QUESTIONS.items() if rate != _BEST},
             m0_variants=0, columns="prefix"),
    Workload("multi_turn",
             "4 chats of 6 turns (GPU: 8 of 8): each prompt is all that was said, 1024 tokens or more (GPU: 4096), and "
             "a message",
             "The turns so far, answers included, are not computed again: the first token of every turn comes about as "
             "soon as that of the first (m6 over m5).",
             _CHATS[_BEST],
             variants={f"hit_rate={rate}": sizes for rate, sizes in _CHATS.items() if rate != _BEST},
             m0_variants=0, columns="prefix", stages_only=True),
    Workload("nano", "256 requests at once, inputs and outputs of 100 to 1024 tokens (CPU: a sixteenth of both)",
             "The last stages reach the throughput of the engines that people use.",
             {"cpu": Size(uniform(16, (6, 64), (6, 64)), 16, 256),
              "gpu": Size(uniform(256, (100, 1024), (100, 1024)), 256, 2048),  # on which small engines publish theirs
              "quick": Size(uniform(4, (4, 8), (4, 8)), 4, 64)},
             repeats=1),
    Workload("decode_one", "one request: 32 tokens in, 128 out (GPU: 128 in, 512 out)",
             "Decoding alone comes close to what the memory bandwidth allows.",
             {"cpu": _alike(1, 32, 128, 512), "gpu": _alike(1, 128, 512, 1024), "quick": _alike(1, 8, 6, 64)}),
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in _ALL}


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
