# %% [markdown]
# # m5: chunked prefill
#
# Up to m4 a step either computes prompts or makes everyone's next token. m5 does both in one step, and no step is long:
# a prompt is computed in chunks, and whoever decodes never waits for somebody else's prompt. Only the scheduler
# changes.
#
# You need: `m2_continuous_batching`; `m4_flash_attention` helps. About 20 minutes.

# %% tags=["setup"]
import stages  # noqa: F401 - first: it bounds how long idle threads spin, before PyTorch is loaded

# isort: split
import time

import matplotlib.pyplot as plt
import torch

from benchmarks.plots.schedule import longest_gap, schedule_figure
from benchmarks.recipes import LONG, SHORT, interference
from benchmarks.schedule import record_schedule
from benchmarks.style import color
from benchmarks.table import rate, seconds
from benchmarks.workloads import Size
from common.models import load_model
from notebooks.checks import m5 as check
from notebooks.kit import HERE, compare, measure, say, show_source, table
from stages.m3_paged_kv.scheduler import PagedScheduler
from stages.m5_chunked_prefill.chunk_size import AutoChunkSize
from stages.m5_chunked_prefill.scheduler import ChunkedScheduler

# %% [markdown]
# ## The problem
#
# Eight requests decode on m4. Three times, when they have made 16 tokens more, a prompt of 1,024 tokens arrives, and
# right behind it a short one. (`interference` is a recipe of the benchmark.)

# %%
PROMPT = 1024
guests = Size(
    interference(steady=8, rounds=3, every=16, prompt=16, long_prompt=PROMPT, other_outputs=8),
    max_num_seqs=14, max_model_len=1088, options={"max_num_batched_tokens": 2 * PROMPT},
)  # fmt: skip
m4 = measure("m4", guests)
say(f"""
Somebody who reads along sees a token every **{seconds(m4.itl_s["p50"])}** in the median. And then, in the middle of a
sentence, nothing for **{seconds(m4.itl_s["max"])}**: {m4.itl_s["max"] / m4.itl_s["p50"]:.0f} times as long, because a
stranger has sent a long document. The mean, {seconds(m4.itl_s["mean"])}, hides it. The 99th percentile,
{seconds(m4.itl_s["p99"])}, does not. These are *inter-token latencies* (ITL).
""")

# %% [markdown]
# ## The idea
#
# How long does a step take? Let us ask the model itself, without any attention: so many tokens go through all its
# layers.

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


times = {rows: step_time(rows) for rows in (1, 8, 16, 64, 256, 264, PROMPT)}
table(
    ["tokens in the step", "time", "for each token"],
    [(f"{rows:,}", seconds(t), f"{t / rows * 1e3:.2f} ms") for rows, t in times.items()],
)
say(f"""
Two things to see. A whole prompt takes {times[PROMPT] / times[8]:.0f} times as long as a step of eight decodes: that is
the stall. And a step has a fixed price, reading all weights once, which a decode alone hardly uses. Eight decodes on
their own take {seconds(times[8])}; a chunk of 256 tokens takes {seconds(times[256])}, and with the eight beside it
**{seconds(times[264])}**. The decodes ride along.
""")

# %% [markdown]
# So: give every step a budget. Who decodes gets one token first. The prompt gets what is left, and goes on in the next
# step. Here is the schedule for the textbook's case, a prompt of 1,000 tokens beside two that decode:


# %%
def steps_of(prompt, chunk, decoding):
    """(tokens of the prompt, decodes) of each step until the prompt is computed."""
    steps = []
    while prompt:
        length = min(prompt, chunk)
        steps.append((length, decoding))
        prompt -= length
    return steps


def price(steps):
    """Seconds of each step, between the times that were measured above."""
    fixed, whole = times[8], times[PROMPT]
    return [fixed + (whole - fixed) * length / PROMPT for length, _ in steps]


schedules = {"whole, decodes wait": [(1000, 0)]}
schedules |= {f"chunks of {chunk}": steps_of(1000, chunk, 2) for chunk in (512, 256, 64)}
table(
    ["", "steps", "of prompt tokens", "longest gap", "first token of the prompt"],
    [
        (name, len(steps), f"{steps[0][0]} … {steps[-1][0]}", seconds(max(price(steps))), seconds(sum(price(steps))))
        for name, steps in schedules.items()
    ],
)  # fmt: skip

# %% [markdown]
# Small chunks give short gaps, and each of them pays the fixed price again. That is the whole trade. (Attention is not
# in this estimate: it makes later chunks dearer than earlier ones.)
#
# ## The code
#
# This is m3's and m4's plan. Either prompts or decodes:

# %%
show_source(PagedScheduler.plan)

# %% [markdown]
# And m5's. Decodes come first, then prompts that have begun, then who waits:

# %%
show_source(ChunkedScheduler.plan, ChunkedScheduler._room_for_prompts, ChunkedScheduler._prefill)

# %% [markdown]
# There are two limits. `max_num_batched_tokens` bounds every step. The chunk size bounds prompts *while somebody
# decodes*; a machine that serves nobody else takes the whole budget.
#
# A request that begins gets blocks for its whole prompt, not for its first chunk. If first chunks were enough, the pool
# could fill up with half-computed prompts, none of which could go on:

# %%
show_source(ChunkedScheduler._admit)

# %% [markdown]
# Attention needed no change: a chunk that begins anywhere was always allowed. `make stage5 diff` shows all of it.
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

# %%
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
# And what the chunk size decides. Dashed: m4.

# %%
figure, axes = plt.subplots(1, 3, figsize=(17, 5))
panels = (
    (axes[0], lambda r: 1e3 * r.itl_s["max"], "longest gap of those who decode, ms"),
    (axes[1], lambda r: 1e3 * r.ttft_by_group[LONG]["p50"], "first token of the long prompt, ms"),
    (axes[2], lambda r: r.output_tokens_per_s, "output tokens a second, all together"),
)
for axis, value, name in panels:
    axis.plot(sizes, [value(m5[chunk]) for chunk in sizes], marker="o", linewidth=3, color=color("m5"))
    axis.axhline(value(m4), color=color("m4"), linestyle="--", linewidth=2)
    axis.annotate("m4", (0, value(m4)), xycoords=("axes fraction", "data"), xytext=(28, 5), textcoords="offset points",
                  color=color("m4"), fontweight="bold")  # fmt: skip
    axis.annotate("m5", (sizes[-1], value(m5[sizes[-1]])), xytext=(9, 0), textcoords="offset points", color=color("m5"),
                  fontweight="bold", va="center", annotation_clip=False)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(chunk) for chunk in sizes])
    axis.set(ylim=(0, None), xlabel="tokens of a chunk")
    axis.set_title(name, loc="left")
    axis.grid(axis="y", color="#E4E4E4")
figure.tight_layout(w_pad=4)
plt.show()

# %% [markdown]
# ## Where it loses

# %%
compare(list(m5.values()), chunk=lambda r: next(chunk for chunk, one in m5.items() if one is r), **columns)
small, default = m5[sizes[0]], m5[DEFAULT]
pays = small.ttft_by_group[LONG]["p50"] / m4.ttft_by_group[LONG]["p50"]
say(f"""
- **The long prompt pays**, for the decodes that ride along and for the fixed price of every chunk: with chunks of
  {DEFAULT} it waits {later:.2f} times as long as in m4, with chunks of {sizes[0]} **{pays:.1f} times**.
- **Small chunks waste the machine.** Each one reads all weights, and the keys and values of everything before it.
  Chunks of {sizes[0]} make {rate(small.output_tokens_per_s)} tokens a second, chunks of {DEFAULT}
  {rate(default.output_tokens_per_s)}, m4 {rate(m4.output_tokens_per_s)}.
- **A chunk is still felt.** The longest gap is {seconds(default.itl_s["max"])}, and the median
  {seconds(default.itl_s["p50"])}. With m4 *few* tokens were very late. Now *more* of them are a little late: as many as
  the prompt has chunks.
- **Without long prompts nothing changes.** There is nothing to cut.
""")

# %% [markdown]
# One figure for all machines does not exist. `prefill_chunk_size="auto"` asks for a time instead (`target_itl`) and
# measures what fits:

# %%
show_source(AutoChunkSize.observe)

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: plan a step
#
# `decoding` requests decode. `left` has, for each prompt in order of arrival, how many of its tokens are left to compute.
# How many tokens of each does the next step compute? A step has at most `budget` tokens, decodes included; while
# somebody decodes, all prompts together get at most `chunk`. The check runs m5 beside you.


# %% tags=["exercise"]
def plan_step(decoding, left, budget, chunk):
    return [min(length, chunk) for length in left]


check.plan_step(plan_step)

# %% [markdown]
# <details><summary>Solution</summary>
#
# There is one budget for all, not one chunk for each.
#
# ```python
# def plan_step(decoding, left, budget, chunk):
#     room = min(budget - decoding, chunk) if decoding else budget
#     lengths = []
#     for length in left:
#         lengths.append(min(length, room))
#         room -= lengths[-1]
#     return lengths
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: the chunk for a promise
#
# Whoever decodes is promised a token every `target` seconds. A step that only decodes takes `decode_seconds`, each
# prompt token adds `token_seconds`. How large may a chunk be? m5 takes multiples of 16, at least 16 (or prompts would
# never end) and at most 8,192.


# %% tags=["exercise"]
def chunk_for(target, decode_seconds, token_seconds):
    fitting = target / token_seconds
    return min(8192, int(fitting) // 16 * 16)


check.chunk_for(chunk_for)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The decodes are in the same step: their time is gone already. And where nothing fits, 16 tokens go on all the same.
#
# ```python
# def chunk_for(target, decode_seconds, token_seconds):
#     fitting = (target - decode_seconds) / token_seconds
#     return max(16, min(8192, int(fitting) // 16 * 16))
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: what small chunks cost attention
#
# Every chunk attends to all that was computed before it, and reads that from the cache again. How many cached tokens
# are read for a whole prompt, summed over its chunks? (The chunk's own tokens do not count.)


# %% tags=["exercise"]
def read_again(prompt, chunk):
    chunks = -(-prompt // chunk)
    return (chunks - 1) * chunk


check.read_again(read_again)

# %% [markdown]
# <details><summary>Solution</summary>
#
# A chunk that begins at token s reads s tokens: 0, c, 2c, and so on, which is about prompt² / 2c.
#
# ```python
# def read_again(prompt, chunk):
#     return sum(range(0, prompt, chunk))
# ```
#
# </details>

# %% [markdown]
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
gaps = {stage: longest_gap(trace, next(iter(trace.arrivals))) for stage, trace in traces.items()}
bends = ", ".join(
    f"{chunk}: {seconds(r.itl_s['max'])} and {rate(r.output_tokens_per_s)} tokens/s" for chunk, r in m5.items()
)
say(f"""
- **Q8: what problem does chunked prefill solve?** A long prompt stalls everyone who decodes: here for
  {seconds(m4.itl_s["max"])}, where a token takes {seconds(m4.itl_s["p50"])}. In chunks of {DEFAULT} the longest gap is
  {seconds(default.itl_s["max"])}. The question's own example, 1,000 tokens beside two that decode, is the picture
  above: {seconds(gaps["m4"])} against {seconds(gaps["m5"])}.
- **Q8, a correction: it lowers "the TTFT of the decoding requests".** They have their first token long since; what
  falls is their inter-token latency. What the long prompt's own TTFT becomes: {later:.2f} times m4's.
- **Q8, follow-up: how large a chunk?** Look where the curves bend. {bends}. On a GPU the bend is at larger sizes: it
  computes hundreds of tokens in the time in which it reads its weights once.
- **Q8, follow-up: why is the throughput about the same?** The same tokens are computed. A chunk costs one more reading
  of the weights, and saves the decode step that rides along: {kept:.2f} times m4's.
- **Follow-up 1: what does your scheduler do?** In each step: a token for everyone who decodes, then prompts under way,
  then who waits, in order of arrival or priority, within one budget; whoever is admitted has blocks for its whole
  prompt.
- **Q11: which part is for latency?** This one, for those who run. For those who wait it is m2 (nobody waits for a
  batch's end) and m6 (a known beginning is not computed).
""")
