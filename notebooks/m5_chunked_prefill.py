# %% [markdown]
# # m5: chunked prefill
#
# Up to m4 a step either computes prompts or decodes. m5 does both in one step, and no step is long: prompts are computed in
# chunks, so decodes never wait for a whole prompt. Only the scheduler changes.
#
# You need: `m2_continuous_batching`; `m4_flash_attention` helps. About 20 minutes.

# %% tags=["setup"]
import time

from benchmarks.plots.schedule import longest_gap, schedule_figure
from benchmarks.recipes import LONG, SHORT, interference
from benchmarks.schedule import record_schedule
from benchmarks.table import rate, seconds
from benchmarks.workloads import Size
from common.models import load_model
from notebooks.checks import m5 as check
from notebooks.kit import HERE, change, compare, draw_lines, each, measure, say, show_source, table
from stages.m3_paged_kv.scheduler import PagedScheduler
from stages.m5_chunked_prefill.chunk_size import AutoChunkSize
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The problem
#
# Eight requests decode on m4. Three times, after 16 more tokens, a prompt of 1,024 tokens arrives, followed by a short one.
# (`interference` is a recipe of the benchmark.)

# %%
PROMPT = 1024
guests = Size(
    interference(steady=8, rounds=3, every=16, prompt=16, long_prompt=PROMPT, other_outputs=8),
    max_num_seqs=14, max_model_len=1088, options={"max_num_batched_tokens": 2 * PROMPT},
)  # fmt: skip
m4 = measure("m4", guests)
say(f"""
A user sees a token every **{seconds(m4.itl_s["p50"])}** in the median (inter-token latency, ITL). And then, in the middle of a
sentence, nothing for **{seconds(m4.itl_s["max"])}**, because another user has sent a long document. The mean,
{seconds(m4.itl_s["mean"])}, hides it; the 99th percentile, {seconds(m4.itl_s["p99"])}, does not.
""")

# %% [markdown]
# ## The idea
#
# How long does a step take? Run the model without attention, for different numbers of tokens:

# %%
model = load_model(HERE["model"], dtype=HERE["dtype"])


@torch.inference_mode()
def step_time(rows):
    """Seconds for `rows` tokens through every layer but attention: the best of three."""
    tokens, times = torch.zeros(rows, dtype=torch.long), []
    for _ in range(3):
        begin = time.perf_counter()
        hidden = model(tokens, tokens, lambda layer, q, k, v: q.contiguous())
        model.logits(hidden[:8])
        times.append(time.perf_counter() - begin)
    return min(times)


times = {rows: step_time(rows) for rows in each("steps without attention", (1, 8, 16, 64, 256, 264, PROMPT))}
table(
    ["tokens in the step", "time", "for each token"],
    [(f"{rows:,}", seconds(t), f"{t / rows * 1e3:.2f} ms") for rows, t in times.items()],
)
say(f"""
A whole prompt takes {times[PROMPT] / times[8]:.0f} times as long as a step of eight decodes: that is the stall. And a step has a
fixed price, reading all weights once. Eight decodes on their own take {seconds(times[8])}; a chunk of 256 tokens takes
{seconds(times[256])}, and together with the eight decodes **{seconds(times[264])}**: in its step the decodes add
{seconds(max(0, times[264] - times[256]))}.
""")

# %% [markdown]
# So give every step a budget. Decodes get one token each first; the prompt gets what is left, and continues in the next step.
# A prompt of 1,000 tokens and two decodes:


# %%
def price(lengths):
    """Seconds of each step, between the times that were measured above."""
    fixed, whole = times[8], times[PROMPT]
    return [fixed + (whole - fixed) * length / PROMPT for length in lengths]


plans = {"whole, decodes wait": [1000]}  # the prompt's tokens in each step
plans |= {f"chunks of {n}": [min(n, 1000 - start) for start in range(0, 1000, n)] for n in (512, 256, 64)}
prices = {name: price(plan) for name, plan in plans.items()}
table(
    ["", "steps", "of prompt tokens", "longest gap", "first token of the prompt"],
    [(n, len(p), f"{p[0]} … {p[-1]}", seconds(max(prices[n])), seconds(sum(prices[n]))) for n, p in plans.items()],
)

# %% [markdown]
# Small chunks give short gaps, and each pays the fixed price again. (This estimate leaves out attention, which makes later
# chunks more expensive than earlier ones.)
#
# ## The code
#
# m3's and m4's plan, either prompts or decodes; and m5's: decodes, then prompts that have begun, then new ones:

# %%
show_source(PagedScheduler.plan)
show_source(ChunkedScheduler.plan, ChunkedScheduler._room_for_prompts, ChunkedScheduler._prefill)

# %% [markdown]
# There are two limits: `max_num_batched_tokens` bounds every step, the chunk size bounds prompts *while requests decode*.
#
# A request that begins gets blocks for its whole prompt. If its first chunk were enough, the pool could fill up with
# half-computed prompts, none of which could go on:

# %%
show_source(ChunkedScheduler._admit)

# %% [markdown]
# Attention is unchanged: it always allowed a chunk at any offset. `make stage5 diff` shows all of it.
#
# ## Measured against m4

# %%
sizes = (32, 128, 256, 512)
m5 = {chunk: measure("m5", guests, prefill_chunk_size=chunk) for chunk in sizes}
DEFAULT = 256
columns = {
    "ITL_p50": lambda r: seconds(r.itl_s["p50"]),
    "ITL_p99": lambda r: seconds(r.itl_s["p99"]),
    "ITL_longest": lambda r: seconds(r.itl_s["max"]),
    "TTFT_of_the_long": lambda r: seconds(r.ttft_by_group[LONG]["p50"]),
    "TTFT_of_the_short": lambda r: seconds(r.ttft_by_group[SHORT]["p50"]),
    "output_tokens_per_s": lambda r: rate(r.output_tokens_per_s),
}
compare([m4, m5[DEFAULT]], **columns)
stall, kept = m5[DEFAULT].itl_s["p99"] / m4.itl_s["p99"], m5[DEFAULT].output_tokens_per_s / m4.output_tokens_per_s
later = m5[DEFAULT].ttft_by_group[LONG]["p50"] / m4.ttft_by_group[LONG]["p50"]
say(f"""
With chunks of {DEFAULT} tokens, the default on a CPU, the 99th percentile of the time between tokens is **{stall:.2f}
times** m4's, at {kept:.2f} times the throughput. The long prompt's first token comes after {later:.2f} times the time.
""")

# %% [markdown]
# ## The picture
#
# A trace of both engines: A and B decode, C is a prompt of 1,000 tokens.

# %%
traces = {stage: record_schedule(stage, **HERE) for stage in ("m4", "m5")}
schedule_figure(traces)
plt.show()

# %% [markdown]
# And what the chunk size decides:

# %%
figure, axes = plt.subplots(1, 3, figsize=(17, 5))
panels = {
    "longest gap between tokens, ms": lambda r: 1e3 * r.itl_s["max"],
    "first token of the long prompt, ms": lambda r: 1e3 * r.ttft_by_group[LONG]["p50"],
    "output tokens a second": lambda r: r.output_tokens_per_s,
}
for axis, (heading, value) in zip(axes, panels.items(), strict=True):
    draw_lines(axis, heading, {"m4": (sizes, [value(m4)] * 4), "m5": (sizes, [value(m5[chunk]) for chunk in sizes])})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(chunk) for chunk in sizes])
    axis.set_xlabel("tokens of a chunk")
figure.tight_layout(w_pad=4)
plt.show()

# %% [markdown]
# ## Where it loses

# %%
compare(list(m5.values()), chunk=lambda r: sizes[list(m5.values()).index(r)], **columns)
small, default = m5[sizes[0]], m5[DEFAULT]
pays = small.ttft_by_group[LONG]["p50"] / m4.ttft_by_group[LONG]["p50"]
say(f"""
- **The long prompt pays** for the decodes and for the fixed price of every chunk: with chunks of {DEFAULT} it waits
  {later:.2f} times as long as in m4, with chunks of {sizes[0]} **{pays:.1f} times**. A short prompt behind it waits as well.
- **Each chunk reads again** all weights, and all K and V before it. Chunks of {sizes[0]} make
  {rate(small.output_tokens_per_s)} tokens a second, chunks of {DEFAULT} {rate(default.output_tokens_per_s)}
  ({change(small.output_tokens_per_s, default.output_tokens_per_s)}, one run each).
- **A chunk is still felt.** The longest gap is {seconds(default.itl_s["max"])}, the median {seconds(default.itl_s["p50"])}. With m4
  *few* tokens were very late; now *more* are a little late, as many as the prompt has chunks.
- **Without long prompts nothing changes.**
""")

# %% [markdown]
# No chunk size fits all machines. `prefill_chunk_size="auto"` asks for a time instead (`target_itl`) and measures what fits:

# %%
show_source(AutoChunkSize.observe)

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: plan a step
#
# `decoding` requests decode. `left` says, for each prompt in order of arrival, how many of its tokens are left to compute. How
# many tokens of each does the next step compute? A step has at most `budget` tokens, decodes included; while requests decode,
# all prompts together get at most `chunk`. The check runs m5.


# %% tags=["exercise"]
def plan_step(decoding, left, budget, chunk):
    return [min(length, chunk) for length in left]


check.plan_step(plan_step)

# %% [markdown]
# <details><summary>Solution</summary>
#
# There is one budget for all, not one chunk for each.
# ```python
# def plan_step(decoding, left, budget, chunk):
#     room = min(budget - decoding, chunk) if decoding else budget
#     lengths = []
#     for length in left:
#         lengths.append(min(length, room))
#         room -= lengths[-1]
#     return lengths
# ```
# </details>
#
# ### Exercise 2: the chunk for a promise
#
# Decoding requests are promised a token every `target` seconds. A step that only decodes takes `decode_seconds`, each prompt
# token adds `token_seconds`. How large may a chunk be? m5 takes multiples of 16, at least 16 (or prompts would never end) and
# at most 8,192.


# %% tags=["exercise"]
def chunk_for(target, decode_seconds, token_seconds):
    fitting = target / token_seconds
    return min(8192, int(fitting) // 16 * 16)


check.chunk_for(chunk_for)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The decodes take their time from the same step. And where nothing fits, 16 tokens are computed all the same.
# ```python
# def chunk_for(target, decode_seconds, token_seconds):
#     fitting = (target - decode_seconds) / token_seconds
#     return max(16, min(8192, int(fitting) // 16 * 16))
# ```
# </details>
#
# ### Exercise 3: what small chunks cost attention
#
# Every chunk reads all that was computed before it from the cache. How many cached tokens are read for a whole prompt, summed
# over its chunks? (The chunk's own tokens do not count.)


# %% tags=["exercise"]
def read_again(prompt, chunk):
    chunks = -(-prompt // chunk)
    return (chunks - 1) * chunk


check.read_again(read_again)

# %% [markdown]
# <details><summary>Solution</summary>
#
# A chunk that begins at token s reads s tokens: 0, c, 2c, and so on, which is about prompt² / 2c.
# ```python
# def read_again(prompt, chunk):
#     return sum(range(0, prompt, chunk))
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
gaps = {stage: longest_gap(trace, next(iter(trace.arrivals))) for stage, trace in traces.items()}
say(f"""
- **Q8: what problem does chunked prefill solve?** A long prompt stalls all decodes: here for {seconds(m4.itl_s["max"])}, where a
  token takes {seconds(m4.itl_s["p50"])}. In chunks of {DEFAULT} the longest gap is {seconds(default.itl_s["max"])}. The question's own
  example, 1,000 tokens and two decodes, is the picture above: {seconds(gaps["m4"])} against {seconds(gaps["m5"])}.
- **Q8, a correction: it lowers "the TTFT of the decoding requests".** They have their first token already; what falls is
  their inter-token latency. The long prompt's own TTFT becomes {later:.2f} times m4's.
- **Q8, follow-up: how large a chunk?** Look where the curves bend. On a GPU the bend is at larger sizes: it computes hundreds
  of tokens in the time in which it reads its weights once.
- **Q8, follow-up: what becomes of the throughput?** The same tokens are computed. A chunk costs one more reading of the
  weights, and saves the decode step that rides along: {kept:.2f} times m4's.
""")
