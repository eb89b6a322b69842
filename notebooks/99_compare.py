# %% [markdown]
# # 99: all eight side by side
#
# The same requests on eight engines, what each stage changed, what that won, what it costs, and which workload shows it.
#
# You need: any of the notebooks before this one, better all. About 20 minutes.

# %% tags=["setup"]
import stages  # first: it bounds how long idle threads spin, before PyTorch is loaded

# isort: split
import time
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from benchmarks.recipes import BenchRequest, first, interference
from benchmarks.style import SOFT, color, title
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from benchmarks.workloads import WORKLOADS, Size, find
from common.config import parse_dtype
from common.models.load import open_source
from common.models.weights import tensor_shapes
from notebooks.checks import compare as check
from notebooks.kit import HERE, compare, measure, say, show_source
from stages.m0_baseline import engine as first_engine
from stages.m7_gptq import engine as last_engine

NAMES = [stages.short_name(folder) for folder in stages.names()]

# %% [markdown]
# ## The problem
#
# Eight requests: the first of the benchmark's `mixed`, answers cut to 16 tokens, room for four at a time. m0 first. Is
# what it makes much or little? The machine itself gives the scale: a decode step must read all weights once, and how fast
# this machine reads can be measured.

# %%
small = Size(first(find("mixed").sizes["cpu"].recipe, 8, 16), max_num_seqs=4, max_model_len=512)
records = {"m0": measure("m0", small)}

config = open_source(HERE["model"]).config
numbers = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
weights_bytes = numbers * parse_dtype(HERE["dtype"]).itemsize
memory, times = torch.ones(2**26), []  # 268 MB: more than any cache holds
for _ in range(6):
    started = time.perf_counter()
    memory.sum()
    times.append(time.perf_counter() - started)
bandwidth = memory.nbytes / min(times)
limit = small.max_num_seqs * bandwidth / weights_bytes
say(f"""
m0 makes **{rate(records["m0"].output_tokens_per_s)} tokens a second**. {written(weights_bytes)} of weights at
{bandwidth / 1e9:.0f} GB/s are {bandwidth / weights_bytes:.0f} steps a second, and {small.max_num_seqs} tokens in each:
**{rate(limit)} tokens a second**, if a step did nothing but read weights. m0 is at
{records["m0"].output_tokens_per_s / limit:.1%} of that. What is all the rest?
""")

# %% [markdown]
# ## The idea
#
# Most of it is work that need not be done. How many positions go through the model? That can be counted without a
# model: m0 computes everything again for each token, m1 only what is new. Both work in batches that end together, with
# every row as long as the longest. From m2 on, there is nothing but the tokens themselves.

# %%
requests = small.requests(config.vocab_size)
rows = small.max_num_seqs
batches = [requests[i : i + rows] for i in range(0, len(requests), rows)]
longest = [(max(len(r.prompt) for r in b), max(r.max_tokens for r in b), len(b)) for b in batches]
positions = {
    "m0": sum(n * sum(prompt + i for i in range(outputs)) for prompt, outputs, n in longest),
    "m1": sum(n * (prompt + outputs - 1) for prompt, outputs, n in longest),
    "m2": sum(len(r.prompt) + r.max_tokens - 1 for r in requests),
}
say(f"""
Positions to compute: **m0 {positions["m0"]:,}, m1 {positions["m1"]:,}, m2 and all others {positions["m2"]:,}.** These
are two of the four kinds of waste that the stages remove, one after the other:

| waste | who removes it | how |
|:--|:--|:--|
| computing again what was computed | m1, m6 | keep K and V; for the next request as well |
| waiting for somebody else | m2, m5 | join and leave at every step; long prompts in chunks |
| memory that is held and empty | m3 | small blocks, taken when they are needed |
| moving bytes for nothing | m4, m7 | no score matrix, no copies of K and V; weights of 4 bits |
""")

# %% [markdown]
# One line for each stage, with its price. None comes free.
#
# | stage | what changes | what it costs |
# |:--|:--|:--|
# | m0 | nothing is kept | each token costs a pass over the whole text |
# | m1 | K and V of past tokens stay in memory | a row for the longest possible request, whatever comes |
# | m2 | requests join and leave at every step | a prefill stops everyone else; a scheduler that decides every step |
# | m3 | K and V in blocks of 16 tokens, found through a table | a gather before each attention; preemption when blocks run out |
# | m4 | attention in tiles, reading the blocks in place | a kernel for each kind of machine |
# | m5 | chunks of prompts and decodes share a step, within a budget of tokens | the first token of a long prompt comes later |
# | m6 | full blocks are found again by their content, and shared | a hash for each block; nothing is won where nothing is shared |
# | m7 | linear layers in 4 bits | quality; prompts and large batches get slower; minutes to quantise |
#
# ## The code
#
# **The model never changes. A stage changes only who runs when, where K and V live, how attention reads them, or what the
# weights are made of.** So an engine is a list of parts, and the imports say where each comes from. The first:

# %%
show_source(first_engine.build)

# %% [markdown]
# The last. `ChunkedScheduler` is m5's, `PagedCache` m6's, `PagedKV` m3's, `FlashAttention` m4's, and `load_quantized` its
# own. `Runner` and `Engine` are the same classes as above.

# %%
show_source(last_engine.build)

# %% [markdown]
# ## Measured: eight engines, one workload

# %%
records |= {name: measure(name, small) for name in NAMES[1:]}
speed = {name: record.output_tokens_per_s for name, record in records.items()}
compare(
    list(records.values()),
    output_tokens_per_s=lambda r: rate(r.output_tokens_per_s),
    times_the_stage_before=lambda r: (
        "" if r.stage == "m0" else f"{speed[r.stage] / speed[f'm{int(r.stage[1]) - 1}']:.2f}"
    ),
    of_the_limit=lambda r: f"{r.output_tokens_per_s / limit:.0%}",
    first_token=lambda r: seconds(r.ttft_s["p50"]),
    further_token=lambda r: seconds(r.itl_s["p50"]),
    the_slowest=lambda r: seconds(r.itl_s["max"]),
    KV_held=lambda r: written(r.kv_reserved_bytes) if r.kv_reserved_bytes else "none",
    of_it_used=lambda r: f"{r.kv_utilization:.0%}" if r.kv_utilization else "",
)
say(f"""
From m0 to m7 **{speed["m7"] / speed["m0"]:.0f} times**. m7's limit is higher than that of the others, as it reads fewer
bytes; the column holds all against the same one. Prompts count in the time, too, and no limit above knows of them.
""")

# %% [markdown]
# ## The picture

# %%
panels = {
    "output tokens a second": ([speed[name] for name in NAMES], rate),
    "time to the first token": ([records[name].ttft_s["p50"] for name in NAMES], seconds),
    "time between tokens": ([records[name].itl_s["p50"] for name in NAMES], seconds),
    "KV memory held at peak": (
        [records[name].kv_reserved_bytes or 0 for name in NAMES],
        lambda b: written(b) if b else "none",
    ),
}
better = ("more is better", "less is better", "less is better", "less is better")
figure, axes = plt.subplots(1, 4, figsize=(14, 5), sharey=True)
for axis, (name, (values, text)), which in zip(axes, panels.items(), better, strict=True):
    axis.barh(NAMES, values, color=[color(stage) for stage in NAMES])
    for stage, value in zip(NAMES, values, strict=True):
        axis.annotate(text(value), (value, stage), xytext=(5, 0), textcoords="offset points", va="center", fontsize=12)
    axis.set(xlim=(0, 1.35 * max(values)), xticks=[])
    axis.set_title(f"{name}\n", loc="left")
    axis.annotate(which, (0, 1.02), xycoords="axes fraction", color=SOFT, fontsize=12)
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.tick_params(length=0)
axes[0].invert_yaxis()
axes[0].set_yticks(NAMES, [title(stage) for stage in NAMES])
figure.tight_layout(w_pad=2)
plt.show()

# %% [markdown]
# ## Where it loses
#
# One workload is one opinion. On this one, some stages win nothing, and a step may even cost more than before:

# %%
changes = {name: speed[name] / speed[before] - 1 for before, name in pairwise(NAMES)}
flat = [f"{name} ({change:+.0%})" for name, change in changes.items() if change < 0.1]
say(f"""
Less than 10 % faster here than the stage before: **{", ".join(flat) or "none"}**. Were they a waste of time? Let us ask
something else. m5 is about those who decode while a long prompt comes in, and m6 about prompts that begin alike.
""")

# %%
arriving = Size(interference(3, 1, 12, 16, 768, 4), 5, 800, options={"max_num_batched_tokens": 1536})


def alike(draw):
    """Eight prompts of 272 tokens, of which they share 256."""
    beginning = draw.tokens(256)
    return [BenchRequest(beginning + draw.tokens(16), 8) for _ in range(8)]


shared = Size(alike, max_num_seqs=4, max_model_len=320)
stall = {name: measure(name, arriving).itl_s["max"] for name in ("m4", "m5")}
hits = {name: measure(name, shared) for name in ("m5", "m6")}
begin = {name: record.ttft_s["p50"] for name, record in hits.items()}
say(f"""
- Three requests decode, and a prompt of 768 tokens arrives: the longest wait for a token is {seconds(stall["m4"])} on m4 and
  **{seconds(stall["m5"])} on m5**.
- Eight prompts that share 256 of their 272 tokens: the first token takes {seconds(begin["m5"])} on m5 and
  **{seconds(begin["m6"])} on m6**, {hits["m6"].prefix_hit_rate:.0%} of whose prompt tokens came from the cache.
""")

# %% [markdown]
# So each stage has its own workload in the benchmark, with the claim that it is held to. `make bench WORKLOAD=single` runs
# one of them; what came out on one CPU and one H100 is in `reports/`.

# %%
SHOWN_BY = {
    "m1": "single",
    "m2": "mixed",
    "m3": "memory_pressure",
    "m4": "long_context",
    "m5": "interference",
    "m6": "shared_prefix",
    "m7": "decode_one",
}
lines = [
    f"| **{m}:** `{name}` | {WORKLOADS[name].description} | {WORKLOADS[name].claim} |" for m, name in SHOWN_BY.items()
]
say("\n".join(["| shown by | what it runs | claim |", "|:--|:--|:--|", *lines]))

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: the most that is possible
#
# Before anyone measures: how many tokens a second can a machine decode at most? A step makes one token for each of `rows`
# requests. It reads all weights, and the K and V of each request; and it computes. Reading and computing happen at the
# same time, so the slower of the two decides. (This is the *roofline* of a decode step.) The answer below was good for one
# short request.


# %% tags=["exercise"]
def most_tokens_per_s(rows, weights_bytes, kv_bytes_per_row, flops_per_token, bandwidth, flops_per_s):
    return rows * bandwidth / weights_bytes


check.most_tokens_per_s(most_tokens_per_s)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Weights are read once for all rows, K and V once for each.
#
# ```python
# def most_tokens_per_s(rows, weights_bytes, kv_bytes_per_row, flops_per_token, bandwidth, flops_per_s):
#     reading = (weights_bytes + rows * kv_bytes_per_row) / bandwidth
#     computing = rows * flops_per_token / flops_per_s
#     return rows / max(reading, computing)
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: which stage?
#
# Seven people want their service to be faster. Name for each the **first** stage that has what they lack. m7 has it all;
# but nobody should put up with 4 bits, or with code that they do not need.

# %% tags=["exercise"]
stage_for = {
    "One user, long answers. The longer an answer gets, the slower it comes.": "m7",
    "Many users, all sorts of lengths. Short answers wait for long ones.": "m7",
    "Short chats, but room for 32,000 tokens must be kept for each. Memory is full with four of them.": "m7",
    "Contracts of 30,000 tokens. The score matrix of a prompt does not fit into memory.": "m7",
    "A chat service. Whenever somebody pastes a long text, all other answers stop for a second.": "m7",
    "A thousand questions a minute, all under the same four pages of instructions.": "m7",
    "One user on a laptop. Each token waits for the weights to be read; small errors are fine.": "m7",
}
check.stage_for(stage_for)

# %% [markdown]
# <details><summary>Solution</summary>
#
# In the order of the questions, as each stage was made for one of them:
#
# ```python
# stage_for = dict(zip(check.PEOPLE, ("m1", "m2", "m3", "m4", "m5", "m6", "m7")))
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: what a part is worth
#
# The linear layers are `share` of a step's time, and something makes them `factor` times as fast. How many times as fast is
# the step? (Amdahl, 1967.)


# %% tags=["exercise"]
def speedup(share, factor):
    return (1 - share) * 1 + share * factor


check.speedup(speedup)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Times add up. Speeds do not.
#
# ```python
# def speedup(share, factor):
#     return 1 / ((1 - share) + share / factor)
# ```
#
# </details>

# %% [markdown]
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured, and after
# it a way to show all this to an audience:

# %%
best = max(speed, key=lambda name: speed[name])
say(f"""
- **Q1: what is this project?** Eight inference engines, each one idea further than the one before, over one model: from
  {rate(speed["m0"])} to {rate(speed[best])} tokens a second ({best}) on the same eight requests, on this machine.
- **Follow-up 5: what did each optimisation win?** On this workload
  {", ".join(f"{name} {speed[name] / speed[before]:.1f} times" for before, name in pairwise(NAMES))} the
  stage before. And each on its own: a stall of {seconds(stall["m5"])} instead of {seconds(stall["m4"])} (m5), a first token
  after {seconds(begin["m6"])} instead of {seconds(begin["m5"])} (m6).
- **Q11: low latency, high throughput or little memory?** Name the workload first. Throughput: m2 and m3, more rows in the
  same step. Latency: m4 and m5. Memory: m3 and m7. First tokens under a common prompt: m6.
- **Q14: how far can it go?** Bytes of a step over bandwidth: {rate(limit)} tokens a second with {small.max_num_seqs} rows
  here, and {best} is at {speed[best] / limit:.0%} of it, prompts included.
- **Follow-up 6: and vLLM?** The same mechanisms. What is left out (several GPUs, speculation, LoRA, pictures) is in the
  guide.

**Before an audience.** `make race` lets m1 and m7 answer the same prompts side by side in the terminal;
`make stage1 stage3 stage6 race PRESET=shared` picks runners and the question (`many`, `long`, `shared`, `memory`, `samples`,
`weights` with stage7, or `all`). `make arena` is the same as a page in the browser, with the memory drawn block by block. Let people guess first.
""")
