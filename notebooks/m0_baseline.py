# %% [markdown]
# # m0: the baseline
#
# The shortest correct program: pad some prompts into one tensor, run the model, take each row's last logits, append a token
# to each row, and run the whole tensor again. All later stages are measured against it.
#
# You need: PyTorch, and what a transformer decoder is. About 20 minutes.

# %% tags=["setup"]
import stages
from benchmarks.plots.timeline import Traced, timeline_figure
from benchmarks.recipes import uniform
from benchmarks.table import rate, seconds
from benchmarks.workloads import Size, find
from common import Engine, SamplingParams
from common.models import load_model, load_tokenizer
from common.watch.trace import StepTrace
from notebooks.checks import m0 as check
from notebooks.kit import HERE, compare, measure, say, show_picture, show_source, table
from stages.m0_baseline.attention import FullAttention
from stages.m0_baseline.batch import pad_batch
from stages.m0_baseline.scheduler import StaticScheduler

import torch

# %% [markdown]
# ## The problem
#
# A language model says how likely each token is to come next. To write text, one asks it again and again:

# %%
model = load_model(HERE["model"], dtype=HERE["dtype"])
tokenizer = load_tokenizer(HERE["model"])
token_ids = tokenizer.encode("The capital of France is")


def causal(layer, q, k, v):
    """softmax(Q Kᵀ / √d) V of one sequence: q [L, Hq, D], k and v [L, Hkv, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


with torch.inference_mode():
    for _ in range(6):
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), causal)  # [L, hidden]
        logits = model.logits(hidden[-1:])[0].float()  # [vocabulary]
        token_ids.append(int(logits.argmax()))
say(f"It writes: **{tokenizer.decode(token_ids)}**")

# %% [markdown]
# Correct, and slow. How slow? The benchmark's own `measure`, for one request of 64 tokens in and 32 out:

# %%
one = measure("m0", Size(uniform(1, (64, 64), (32, 32)), max_num_seqs=1, max_model_len=128))
weights = model.weights_bytes()
say(f"""
**{rate(one.output_tokens_per_s)} tokens a second**, {seconds(one.itl_s["p50"])} for each, from a model of only
{weights / 1e6:.0f} MB. And that is one user.
""")

# %% [markdown]
# ## The idea
#
# Several users at once: a *batch*. A tensor has rows of one length, so shorter rows are padded on the right, where causal
# attention never looks.

# %%
prompts = [tokenizer.encode(text) for text in ("One, two, three, four, five,", "Water boils at", "Hello")]
longest = max(map(len, prompts))
padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
real = sum(map(len, prompts))
passes = [64 + made for made in range(32)]
say(f"""
Rows of {", ".join(str(len(ids)) for ids in prompts)} tokens make a tensor of {list(padded.shape)}: **{padded.numel()}
positions, of which {padded.numel() - real} are padding**. And every further step computes the whole rectangle again, one column
wider, to get one token for each row: for one row of 64 tokens in and 32 out {sum(passes):,} positions go through the model, each
token {sum(passes) / (64 + 32):.0f} times on average.
""")

# %% [markdown]
# ## The code
#
# m0 is five short files. A step: the scheduler says which tokens to compute (`plan`), the runner computes them
# (`execute`), the scheduler takes the new tokens (`update`). That loop is the same in all eight stages:

# %%
show_source(Engine.step)

# %% [markdown]
# m0's policy. A batch starts together; the next one waits until all of this one have ended. A finished request keeps its
# row, and is still computed, because the rectangle cannot have a hole:

# %%
show_source(StaticScheduler.plan, StaticScheduler._row)

# %% [markdown]
# The padded batch, and attention as the formula is written, with the whole score matrix in memory:

# %%
show_source(pad_batch, FullAttention.attend)

# %% [markdown]
# ## Measured
#
# There is no stage before this one, but what does a batch gain? The first six requests of the benchmark's `ladder`, one row
# at a time and four:


# %%
def six(draw):
    return find("ladder").sizes["cpu"].recipe(draw)[:6]


alone, four = (measure("m0", Size(six, max_num_seqs=rows, max_model_len=512)) for rows in (1, 4))
shown = ("requests at once", "output tokens/s", "first token", "each further token", "wasted positions")
compare([alone, four], *shown)
say(f"""
Four rows give **{four.output_tokens_per_s / alone.output_tokens_per_s:.1f} times** the throughput of one, not four times:
m0's steps are full of arithmetic already, and **{four.padding_share:.0%}** of it is wasted.
""")

# %% [markdown]
# ## The picture
#
# Four requests in three rows, as the engine's trace records them. After its first step m0 recomputes everything in each step.

# %%
with stages.build("m0", max_num_seqs=3, max_model_len=64, **HERE) as engine:
    engine.trace = StepTrace()
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (4, 12, 7, 5)]
    engine.generate([prompts[0], prompts[1], prompts[2], prompts[1]], params)
    steps = list(engine.trace.steps)

show_picture(lambda: timeline_figure([Traced("m0", engine.trace, 0)]))
needed = sum(len(p) + count.max_tokens - 1 for p, count in zip((*prompts, prompts[1]), params, strict=True))
computed = sum(len(step.chunks) * max(chunk.length for chunk in step.chunks) for step in steps)
say(f"""
The last request waits {len(steps) - params[-1].max_tokens} steps for the batch before it. In all **{computed} positions were
computed where {needed} would do**, if nothing were computed twice or wasted.
""")

# %% [markdown]
# ## Where it loses
#
# Everywhere, and each of the next stages removes one reason:

# %%
long = measure("m0", Size(uniform(1, (192, 192), (8, 8)), max_num_seqs=1, max_model_len=256))
heads, tokens = model.config.num_heads, 4096
table(
    ["what", "how much", "removed by"],
    [
        ["a token at position 64 … 96", seconds(one.itl_s["p50"]), "m1"],
        ["a token at position 192 … 200", seconds(long.itl_s["p50"]), "m1"],
        ["wasted positions", f"{four.padding_share:.0%}", "m2"],
        ["score matrix of one layer and row at 4,096 tokens", f"{heads * tokens**2 * 2 / 1e6:,.0f} MB", "m4"],
    ],
)

# %% [markdown]
# What it does *not* lose is correctness. Nothing is remembered, so nothing can be stale: every later stage's greedy tokens
# are compared with m0's.
#
# ## Exercises
#
# ### Exercise 1: causal attention
#
# `q`, `k`, `v` are `[L, D]`, one head of one sequence. One line is missing.


# %% tags=["exercise"]
def attention(q, k, v):
    scores = q @ k.T * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


check.attention(attention)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Row i of the scores belongs to query i. Everything right of the diagonal is its future.
# ```python
# def attention(q, k, v):
#     scores = q @ k.T * q.shape[-1] ** -0.5
#     scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
#     return scores.softmax(-1) @ v
# ```
# </details>
#
# ### Exercise 2: what is wasted
#
# One batch of m0: lists of prompt lengths and output lengths. Which share of all positions that it computes, over all its
# steps, is padding or a row that has ended? The start below only counts the first step.


# %% tags=["exercise"]
def padding_share(prompts, outputs):
    computed = len(prompts) * max(prompts)
    return 1 - sum(prompts) / computed


check.padding_share(padding_share)

# %% [markdown]
# <details><summary>Solution</summary>
#
# There are as many steps as the longest output has tokens. A row grows by one with each token; a finished request keeps its
# length, and no longer counts as useful.
# ```python
# def padding_share(prompts, outputs):
#     computed = useful = 0
#     for step in range(max(outputs)):
#         rows = [p + min(step, o) for p, o in zip(prompts, outputs)]
#         computed += len(rows) * max(rows)
#         useful += sum(row for row, o in zip(rows, outputs) if step < o)
#     return 1 - useful / computed
# ```
# </details>
#
# ### Exercise 3: the score matrix
#
# How many bytes does `scores` take in `FullAttention.attend`, for one layer?


# %% tags=["exercise"]
def score_bytes(rows, heads, length, bytes_of_a_number):
    return rows * heads * length * bytes_of_a_number


check.score_bytes(score_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Every query has a score for every key: `[rows, heads, length, length]`.
# ```python
# def score_bytes(rows, heads, length, bytes_of_a_number):
#     return rows * heads * length**2 * bytes_of_a_number
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q4: what does it cost to have no KV cache?** A token at position 192 took {seconds(long.itl_s["p50"])}, one at 64
  {seconds(one.itl_s["p50"])}: the whole text goes through the model for each of them.
- **Q7: what is wrong with static batches?** They pad to the longest prompt and run to the longest answer:
  {four.padding_share:.0%} of the positions above were wasted, and a late request waited for a whole batch.
- **Follow-up 7: how do you know that an engine is right?** Compare it with something too simple to be wrong: here m0, which
  is itself compared with transformers.
""")
