"""What each optimisation is said to gain, as data: the claim, what was expected, how it is measured; and its verdict.

The predictions come from the interview questions and the plan of this repository, before anything was measured.
"""

from dataclasses import dataclass

from benchmarks.report.figures import alternatives, command_for, evaluate, names_in, show, workload_of
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine


@dataclass(frozen=True)
class Claim:
    """`figure`: what is measured, in the language of `benchmarks.report.figures`; `form`: how it is written.

    Met: `low` or more, `high` or less. A range that may be exceeded has only `low` here, and both in `expected`.
    `figure` may name a second workload behind ` or `, for machines that ran that one.
    `why`: said where it is not met; it may hold {figure:...}. `note`: said wherever it is measured.
    """

    stage: str
    said: str
    expected: str
    how: str
    figure: str
    form: str = "times"
    low: float | None = None
    high: float | None = None
    why: str = ""
    note: str = ""


_FAST_PREFILL = (
    "all of a prompt is prefilled in {{figure:{0}.m5.ttft_s.p50|s}} here; what no cache can save, a step over a long "
    "context, is a large part of that"
)

SHIPPED = "int4 GPTQ, group 32, asymmetric"  # the row of the weights that m7 makes unless told otherwise

# Of each: the stage, what is said, what was expected, how it is shown; the figure and its bounds; reasons.
CLAIMS = (
    Claim("m1", "a new token's cost no longer grows with the sequence", "level: at most 1.15×",
          "time of the last quarter of 128 tokens over that of the first (m0: it grows)",
          "single.m1.itl_growth", high=1.15,
          why="attention still reads the whole context for each token; the linear layers no longer do",
          note="m0: {figure:single.m0.itl_growth|times}. Attention still reads all of the context, layers do not"),
    Claim("m1", "O(n) work for n tokens instead of O(n²)", "over 1×", "output tokens/s over m0's",
          "single.m1.output_tokens_per_s / single.m0.output_tokens_per_s", low=1,
          why="with so few tokens a GPU waits for the host in both, and m1 has more to start in a step"),
    Claim("m1", "memory = 2 × layers × KV heads × head_dim × tokens × bytes", "the formula",
          "bytes of K and V that are stored, over the formula's",
          "single.m1.kv_bytes_per_token / single.m1.kv_formula", low=0.999, high=1.001),
    Claim("m2", "throughput 3–5×", "3–5×", "output tokens/s over m1's, of the idea alone",
          "mixed.m2.plain.output_tokens_per_s / mixed.m1.output_tokens_per_s or "
          "mixed.m2.output_tokens_per_s / mixed.m1.output_tokens_per_s", low=3,
          why="the factor is the share of m1's positions that no request needs: {figure:mixed.m1.padding_share|share} "
              "here, which alone allows {figure:mixed.m1.padding_bound|times}"),
    Claim("m2", "lower latency", "over 1×", "mean time of a request, m1's over m2's",
          "mixed.m1.e2e_s.mean / mixed.m2.e2e_s.mean", low=1),
    Claim("m2", "no head-of-line blocking", "over 1×",
          "median time to the first token under random arrivals, m1's over m2's",
          "arrivals.m1.ttft_s.p50 / arrivals.m2.ttft_s.p50", low=1),
    Claim("m3", "KV utilisation about 20 % → over 90 %", "over 90 %", "tokens stored over slots held, mean over time",
          "memory_pressure.m3.kv_utilization", form="share", low=0.9,
          note="m2: {figure:memory_pressure.m2.kv_utilization|share}. The '20 %' depends on the length "
               "that is reserved"),
    Claim("m3", "memory ÷ 2, or batch × 2", "2× or more",
          "requests that run at once at the peak, over m2's, in the same bytes",
          "memory_pressure.m3.peak_running / memory_pressure.m2.peak_running", low=2),
    Claim("m3", "zero external fragmentation", "under 10 %, all in last blocks",
          "slots held that are empty; blocks are all of one size, so that a free one always fits",
          "1 - memory_pressure.m3.kv_utilization", form="share", high=0.1),
    Claim("m4", "attention 2–4× faster", "2–4×", "seconds in attention, m3's over m4's",
          "long_context.m3.plain.attention_time_s / long_context.m4.plain.attention_time_s or "
          "long_context.m3.attention_time_s / long_context.m4.attention_time_s or "
          "long_context[prompt=2048].m3.attention_time_s / long_context[prompt=2048].m4.attention_time_s", low=2,
          note="m3 copies the context together and writes the scores; against SDPA on contiguous K and V see the "
               "kernels. A clock cannot see into a CUDA graph"),
    Claim("m4", "attention memory 10–20× lower", "10–20×", "peak of activations, m3's over m4's",
          "long_context.m3.peak_activation_bytes / long_context.m4.peak_activation_bytes", low=10,
          note="O(n²) against O(n): the factor grows with the prompt"),
    Claim("m4", "TTFT −20–30 %", "20–30 %", "time to the first token saved, of m3's",
          "1 - long_context.m4.plain.ttft_s.p50 / long_context.m3.plain.ttft_s.p50 or "
          "1 - long_context.m4.ttft_s.p50 / long_context.m3.ttft_s.p50", form="share", low=0.2,
          note="of the idea alone where that was measured, else as the stages run by default"),
    Claim("m4", "4× longer context", "4×",
          "sweep: its longest prompt, over the longest that m3 runs in as many bytes of activations "
          "(between its points)",
          "long_context.m4.longer_context", low=4,
          why="activations that do not depend on the attention weigh more here"),
    Claim("m5", "p99 inter-token latency −50 %", "50 % or more",
          "of the requests that decode while long prompts arrive, saved of m4's",
          "1 - interference.m5.itl_s.p99 / interference.m4.itl_s.p99", form="share", low=0.5,
          why="a step with a chunk in it still takes {figure:interference.m5.itl_s.p99|s}, where a whole prompt took "
              "{figure:interference.m4.itl_s.p99|s}: here a chunk costs more than its share of the prompt"),
    Claim("m5", "throughput about equal", "within 5 %", "output tokens/s over m4's",
          "interference.m5.output_tokens_per_s / interference.m4.output_tokens_per_s", low=0.95, high=1.05,
          why="with chunks decodes ride along with prompts, and each chunk reads the weights again; which weighs more "
              "depends on the machine"),
    Claim("m5", "chunks of 256–512 are the sweet spot", "256–512",
          "sweep: the smallest chunk that keeps 95 % of the best one's throughput",
          "interference.m5.sweet_spot", form="n", low=256, high=512,
          why="it lies where a chunk's fixed cost becomes small against its work, which differs from "
              "machine to machine"),
    Claim("m6", "TTFT 3–10× lower on hits", "3–10×",
          "median time to the first token, m5's over m6's, 95 % of each prompt cached",
          "shared_prefix.m5.ttft_s.p50 / shared_prefix.m6.ttft_s.p50", low=3,
          why=_FAST_PREFILL.format("shared_prefix")),
    Claim("m6", "the same in chats", "3–10×", "median time to the first token, m5's over m6's",
          "multi_turn.m5.ttft_s.p50 / multi_turn.m6.ttft_s.p50", low=3,
          why=_FAST_PREFILL.format("multi_turn")),
    Claim("m6", "memory is shared", "some", "blocks taken from the cache instead of computed",
          "shared_prefix.m6.blocks_shared", form="n", low=1),
    Claim("m6", "without hits it costs nothing", "within 5 %",
          "sweep: median time to the first token at 0 % hits, over m5's",
          "shared_prefix[hit_rate=0].m6.ttft_s.p50 / shared_prefix[hit_rate=0].m5.ttft_s.p50", high=1.05,
          why="prompts with nothing in common pay for their hashes"),
    Claim("m7", "quantised weights −75 %", "75 %",
          "bytes of the quantised layers saved, scales and zero points included",
          f"1 - quality.{SHIPPED}.layer_bytes / quality.bf16.layer_bytes", form="share", low=0.75,
          why="four bits of sixteen are a quarter, and every group of weights has a scale and a zero point besides. "
              "Of the whole model, whose embedding stays, "
              f"{{figure:1 - quality.{SHIPPED}.model_bytes / quality.bf16.model_bytes|share}}"),
    Claim("m7", "speed +20–50 %, one request", "20–50 %", "output tokens/s over m6's",
          "single.m7.output_tokens_per_s / single.m6.output_tokens_per_s - 1 or "
          "decode_one.m7.output_tokens_per_s / decode_one.m6.output_tokens_per_s - 1", form="signed", low=0.2,
          why="only the time to read the linear layers' weights shrinks; attention, head and launches do not"),
    Claim("m7", "speed +20–50 %, full batches", "20–50 %", "output tokens/s over m6's",
          "mixed.m7.output_tokens_per_s / mixed.m6.output_tokens_per_s - 1 or "
          "decode.m7.output_tokens_per_s / decode.m6.output_tokens_per_s - 1", form="signed", low=0.2,
          why="the more rows, the less a step waits for its weights alone, and 4-bit ones must be unpacked: with tens "
              "of rows a CPU is bound by its arithmetic, a GPU by that kernel"),
    Claim("m7", "perplexity +1 % or less", "1 % or less", f"of m7's own settings ({SHIPPED}), over bf16",
          f"quality.{SHIPPED}.perplexity / quality.bf16.perplexity - 1", form="signed", high=0.01,
          why="small models lose more: the figure belongs to models of billions of weights"),
    Claim("all", "throughput 3–5× over the baseline", "3–5×", "output tokens/s of the last stage measured, over m0's",
          "ladder.last.output_tokens_per_s / ladder.m0.output_tokens_per_s", low=3,
          note="the ideas alone, without execution: {figure:ladder.last.plain.output_tokens_per_s / "
               "ladder.m0.output_tokens_per_s|times}"),
    Claim("all", "memory −50 %", "50 %", "KV memory held for each token stored, saved of m1's by the last stage",
          "1 - mixed.m1.kv_utilization / mixed.last.kv_utilization", form="share", low=0.5,
          note="of the KV cache; weights stay as they are up to m6"),
    Claim("all", "the last stage is over 10× m1", "over 10×", "output tokens/s of the last stage measured, over m1's",
          "mixed.last.output_tokens_per_s / mixed.m1.output_tokens_per_s", low=10,
          why="m1 decodes in batches already; what it leaves to gain is padding, idle rows, scores and launches",
          note="the ideas alone, without execution: {figure:mixed.last.plain.output_tokens_per_s / "
               "mixed.m1.output_tokens_per_s|times}"),
    Claim("all", "about 80 % of vLLM", "80 %",
          "output tokens/s of m6, the last stage in bf16, over vLLM's on such a GPU, greedy, 256 requests drawn alike",
          "nano.m6.output_tokens_per_s / reference.vllm.nano", form="share", low=0.8,
          note="vLLM ran apart from this run, and not the same draw: see *Peers*"),
)  # fmt: skip

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured here"


@dataclass(frozen=True)
class Verdict:
    """`verdict`: one of the three above. `workload`: that, or the point of a sweep, on which it was measured. `why`:
    the reason, a note, or the command that would measure it."""

    verdict: str
    workload: str
    value: str = "–"
    why: str = ""


def judge(claim: Claim, machine: Machine, filler: Filler) -> Verdict:
    for figure in alternatives(claim.figure):
        value = evaluate(machine, figure)
        if value is not None:
            break
    else:
        workload = workload_of(claim.figure)
        why = f"`{command_for(claim.figure, machine.is_gpu, machine.model)}`"
        if machine.peers is None and any(name.startswith("reference.") for name in names_in(claim.figure)):
            why = "on a GPU of `reports/peers` only"
        elif workload == "quality" and machine.model.startswith("random:"):
            why = "random weights have no quality to lose"
        return Verdict(NOT_MEASURED, workload, why=why)
    met = (claim.low is None or value >= claim.low) and (claim.high is None or value <= claim.high)
    reason = claim.note if met else claim.why or claim.note
    point = names_in(figure)[0].split(".")[0]
    return Verdict(MET if met else NOT_MET, point, show(value, claim.form), filler.fill(reason))
