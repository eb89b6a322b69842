# %% [markdown]
# # 99: all eight side by side
#
# The same requests on eight engines: what each stage changed, gained and costs, and which workload shows it.
#
# You need: any of the notebooks before this one, better all. About 20 minutes.

# %% tags=["setup"]
from itertools import pairwise

import stages
from benchmarks.recipes import BenchRequest, first, interference
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from benchmarks.workloads import WORKLOADS, Size, find
from common.config import parse_dtype
from common.models.load import open_source
from common.models.weights import tensor_shapes
from notebooks.checks import compare as check
from notebooks.kit import HERE, compare, draw_bars, measure, read_bandwidth, say, show_source, table
from stages.m0_baseline import engine as first_engine
from stages.m7_gptq import engine as last_engine

import torch

NAMES = [stages.short_name(folder) for folder in stages.names()]

# %% [markdown]
# ## The problem
#
# Eight requests: the first of the benchmark's `mixed`, answers cut to 16 tokens, room for four at a time. m0 first. The
# machine gives the scale: a decode step must read all weights once, and how fast this machine reads can be measured.

# %%
small = Size(first(find("mixed").sizes["cpu"].recipe, 8, 16), max_num_seqs=4, max_model_len=512)
records = {"m0": measure("m0", small)}

config = open_source(HERE["model"]).config
numbers = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
weights_bytes = numbers * parse_dtype(HERE["dtype"]).itemsize
bandwidth = read_bandwidth()
limit = small.max_num_seqs * bandwidth / weights_bytes
say(f"""
m0 makes **{rate(records["m0"].output_tokens_per_s)} tokens a second**. {written(weights_bytes)} of weights at
{bandwidth / 1e9:.0f} GB/s are {bandwidth / weights_bytes:.0f} steps a second, and {small.max_num_seqs} tokens in each:
**{rate(limit)} tokens a second**, if a step only read weights. m0 reaches {records["m0"].output_tokens_per_s / limit:.1%} of that.
""")

# %% [markdown]
# ## The idea
#
# Most of the rest is work that need not be done. How many positions go through the model? m0 computes everything again for
# each token, m1 only what is new; both in batches that end together, with every row as long as the longest. From m2 on,
# there are only the tokens themselves.

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
Positions to compute: **m0 {positions["m0"]:,}, m1 {positions["m1"]:,}, m2 and all others {positions["m2"]:,}.**
""")

# %% [markdown]
# Each stage removes one kind of waste, and has its price:
#
# | stage | what changes | what it removes | what it costs |
# |:--|:--|:--|:--|
# | m1 | K and V of past tokens are kept | computing again | a row for the longest possible request |
# | m2 | requests join and leave at every step | waiting, padding | a prefill stops all decodes |
# | m3 | K and V in blocks of 16 tokens, found through a table | reserved, empty memory | a gather before each attention; preemption |
# | m4 | attention in tiles, reading the blocks in place | the score matrix, copies | a kernel for each kind of machine |
# | m5 | prompt chunks and decodes share a step | stalls | the first token of a long prompt comes later |
# | m6 | full blocks are found again by their content | computing again, for the next request | a hash for each block |
# | m7 | linear layers in 4 bits | reading bytes | quality; slower prompts and large batches; minutes to quantise |
#
# ## The code
#
# **The model never changes. A stage changes only who runs when, where K and V live, how attention reads them, or what the
# weights are made of.** So an engine is a list of parts. The first and the last; in the last, the scheduler is m5's, the cache
# m6's, the KV tensors m3's, attention m4's, and `load_quantized` its own:

# %%
show_source(first_engine.build, last_engine.build)

# %% [markdown]
# ## Measured: eight engines, one workload

# %%
records |= {name: measure(name, small) for name in NAMES[1:]}
speed = {name: record.output_tokens_per_s for name, record in records.items()}
gains = {name: f"{speed[name] / speed[before]:.2f}" for before, name in pairwise(NAMES)}
compare(
    list(records.values()),
    *("output tokens/s", "first token", "each further token", "KV slots filled"),
    times_the_stage_before=lambda r: gains.get(r.stage, ""),
    of_the_limit=lambda r: f"{r.output_tokens_per_s / limit:.0%}",
    the_slowest=lambda r: seconds(r.itl_s["max"]),
    KV_held=lambda r: written(r.kv_reserved_bytes) if r.kv_reserved_bytes else "none",
)
say(f"""
From m0 to m7 **{speed["m7"] / speed["m0"]:.0f} times**. The limit is that of 16-bit weights, also for m7, and leaves out the
prompts' time.
""")

# %% [markdown]
# ## The picture

# %%
panels = {
    "output tokens a second": (lambda r: r.output_tokens_per_s, rate),
    "first token (less is better)": (lambda r: r.ttft_s["p50"], seconds),
    "between tokens (less)": (lambda r: r.itl_s["p50"], seconds),
    "KV memory held (less)": (lambda r: r.kv_reserved_bytes, written),
}
draw_bars(list(records.values()), panels)

# %% [markdown]
# ## Where it loses
#
# On one workload some stages gain nothing, or even lose: those with about 1 or less under *times the stage before* above. Other
# workloads show what they are for: m5 a long prompt that arrives while others decode, m6 prompts that begin alike.

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
# So each stage has its own workload in the benchmark, with a claim to test. `make bench WORKLOAD=single` runs one of them; our
# results are in `reports/`.

# %%
SHOWN_BY = ("single", "mixed", "memory_pressure", "long_context", "interference", "shared_prefix", "decode_one")
shown = [(m, f"`{name}`", WORKLOADS[name]) for m, name in zip(NAMES[1:], SHOWN_BY, strict=True)]
table(["stage", "shown by", "what it runs", "claim"], [(m, name, w.description, w.claim) for m, name, w in shown])

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: the most that is possible
#
# How many tokens a second can a machine decode at most? A step makes one token for each of `rows` requests. It reads all
# weights and the K and V of each request, and computes at the same time, so the slower of the two decides (the *roofline* of
# a decode step). The answer below is right for one short request.


# %% tags=["exercise"]
def most_tokens_per_s(rows, weights_bytes, kv_bytes_per_row, flops_per_token, bandwidth, flops_per_s):
    return rows * bandwidth / weights_bytes


check.most_tokens_per_s(most_tokens_per_s)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Weights are read once for all rows, K and V once for each.
# ```python
# def most_tokens_per_s(rows, weights_bytes, kv_bytes_per_row, flops_per_token, bandwidth, flops_per_s):
#     reading = (weights_bytes + rows * kv_bytes_per_row) / bandwidth
#     computing = rows * flops_per_token / flops_per_s
#     return rows / max(reading, computing)
# ```
# </details>
#
# ### Exercise 2: which stage?
#
# Name for each of these services the **first** stage that has what it lacks.

# %% tags=["exercise"]
stage_for = {
    "One user, long answers. The longer an answer gets, the slower it comes.": "m7",
    "Many users, all sorts of lengths. Short answers wait for long ones.": "m7",
    "Short chats, but room for 32,000 tokens must be kept for each. Memory is full with four of them.": "m7",
    "Contracts of 30,000 tokens. The score matrix of a prompt does not fit into memory.": "m7",
    "A chat service. Whenever one user pastes a long text, all other answers stop for a second.": "m7",
    "A thousand questions a minute, all under the same four pages of instructions.": "m7",
    "One user on a laptop. Each token waits for the weights to be read; small errors are fine.": "m7",
}
check.stage_for(stage_for)

# %% [markdown]
# <details><summary>Solution</summary>
#
# In the order of the questions:
# ```python
# stage_for = dict(zip(check.PEOPLE, ("m1", "m2", "m3", "m4", "m5", "m6", "m7")))
# ```
# </details>
#
# ### Exercise 3: what a part is worth
#
# The linear layers are `share` of a step's time and become `factor` times as fast. How many times as fast is the step?
# (Amdahl's law.)


# %% tags=["exercise"]
def speedup(share, factor):
    return (1 - share) * 1 + share * factor


check.speedup(speedup)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Times add up. Speeds do not.
# ```python
# def speedup(share, factor):
#     return 1 / ((1 - share) + share / factor)
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
best = max(speed, key=lambda name: speed[name])
say(f"""
- **Q1: what is this project?** Eight inference engines over one model, each adding one idea to the previous one: from
  {rate(speed["m0"])} to {rate(speed[best])} tokens a second ({best}) on the same eight requests, on this machine.
- **Follow-up 5: what did each optimisation gain?** On this workload
  {", ".join(f"{name} {speed[name] / speed[before]:.1f} times" for before, name in pairwise(NAMES))} the
  stage before. On its own workload: a stall of {seconds(stall["m5"])} instead of {seconds(stall["m4"])} (m5), a first token
  after {seconds(begin["m6"])} instead of {seconds(begin["m5"])} (m6).
- **Q11: low latency, high throughput or little memory?** Name the workload first. Throughput: m2 and m3. Latency: m4 and m5.
  Memory: m3 and m7. First tokens with a common prompt: m6.
- **Q14: how far can it go?** Bytes of a step over bandwidth: {rate(limit)} tokens a second with {small.max_num_seqs} rows
  here; {best} reaches {speed[best] / limit:.0%} of it, prompts included.

`make race` runs m1 and m7 side by side on the same prompts in the terminal, `make arena` on a page in the browser.
""")
