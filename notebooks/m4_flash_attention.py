# %% [markdown]
# # m4: flash attention
#
# m3 computes softmax(Q Kᵀ) V as it is written, with the scores of all queries and all keys in memory. m4 computes the same
# numbers without that matrix, and reads the blocks in place instead of gathering them first.
#
# You need: `m3_paged_kv`, and softmax. About 30 minutes.

# %% tags=["setup"]
import inspect
import json

from benchmarks.recipes import uniform
from benchmarks.table import seconds
from benchmarks.table import size as written
from benchmarks.workloads import Size
from common.execution.cpu import simd
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from notebooks.checks import m4 as check
from notebooks.kit import HERE, ROOT, compare, draw_lines, measure, measure_prompts, say, show_source, table
from stages.m2_continuous_batching.attention import full_attention
from stages.m3_paged_kv.attention import GatherAttention
from stages.m4_flash_attention.attention import FlashAttention, attend_blocks, flash_attention
from stages.m4_flash_attention.fast.kernels import cpu_decode, cpu_prefill

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The problem
#
# Prompts on m3, one at a time, 16 tokens out. Each length is twice the one before.

# %%
LENGTHS = (192, 384, 768, 1536)
config = open_source(HERE["model"]).config
m3 = measure_prompts("m3", LENGTHS)
scores = {n: 2 * config.num_heads * n * n for n in LENGTHS}  # bytes
table(
    ["prompt", "first token", "attention, all steps", "activations", "scores of one layer"],
    [
        (n, seconds(r.ttft_s["p50"]), seconds(r.attention_time_s), written(r.peak_activation_bytes), written(scores[n]))
        for n, r in zip(LENGTHS, m3, strict=True)
    ],
)  # fmt: skip
growth = m3[-1].attention_time_s / m3[-2].attention_time_s
say(f"""
Twice the prompt is four times the scores. From {LENGTHS[-2]:,} to {LENGTHS[-1]:,} tokens the time in attention grew
**{growth:.1f} times**. Activations follow the scores ({config.num_heads} heads × queries × keys, 2 bytes a number, and a float32
copy for the softmax). At the model's limit of {config.max_position_embeddings:,} tokens the scores of *one layer* would be
{written(2 * config.num_heads * config.max_position_embeddings**2)}.
""")

# %% [markdown]
# Is it the arithmetic? The matrix is also written, read for the softmax, written again, and read once more for the product
# with V. What has to move:


# %%
def bytes_moved(n, layer_heads=config.num_heads, dim=config.head_dim, bytes_of_a_number=2):
    """Of one layer: what goes in and comes out, and what the scores add to it when they are written and read twice."""
    in_and_out = (2 * layer_heads + 2 * config.num_kv_heads) * n * dim * bytes_of_a_number
    return in_and_out, 4 * layer_heads * n * n * bytes_of_a_number


table(
    ["prompt", "Q, K, V and the output", "the scores, four times", "ratio"],
    [(f"{n:,}", written(a), written(b), f"{b / a:.0f}") for n in (*LENGTHS, 8192) for a, b in [bytes_moved(n)]],
)

# %% [markdown]
# Only the output is wanted, and that is small.
#
# ## The idea
#
# Walk over the keys in tiles and keep three things for each query: `m`, the largest score so far; `l`, the sum of exponentials
# relative to it; `acc`, the sum over V with these weights. When a tile brings a larger score, `l` and `acc` are multiplied by
# exp(old m − new m). That is the **online softmax**. If a tile is a block of m3, the walk can follow the block table. One
# query of one head:

# %%
torch.manual_seed(127)
BLOCK, DIM, LENGTH = 16, 64, 60
block_table = [5, 0, 3, 6]
key_blocks, value_blocks = torch.randn(2, 8, BLOCK, DIM)
q = 2 * torch.randn(DIM)


def gathered():
    """As m3 does it: gather the context, then softmax over all of it."""
    keys, values = (blocks[block_table].flatten(0, 1)[:LENGTH] for blocks in (key_blocks, value_blocks))
    return (keys @ q * DIM**-0.5).softmax(0) @ values


def in_place():
    """Block by block; at most BLOCK scores exist at a time. Returns the output, and what was kept after each block."""
    m, l, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(DIM)
    seen = []
    for i, block in enumerate(block_table):
        held = min(BLOCK, LENGTH - i * BLOCK)  # the last block may not be full
        scores = key_blocks[block, :held] @ q * DIM**-0.5
        m_new = torch.maximum(m, scores.max())
        shrink = (m - m_new).exp()
        p = (scores - m_new).exp()
        l = l * shrink + p.sum()
        acc = acc * shrink + p @ value_blocks[block, :held]
        m = m_new
        seen.append((block, f"{scores.max():.2f}", f"{m:.2f}", f"{shrink:.3f}", f"{l:.2f}"))
    return acc / l, seen


output, seen = in_place()
far = (output - gathered()).abs().max().item()
table(["block", "its largest score", "m", "older sums shrink by", "l"], seen)
say(f"The two outputs differ by at most **{far:.0e}**: what rounding leaves.")

# %% [markdown]
# A prefill does this for a tile of queries at once, so that a tile of K and V is read once for all of them. A decode has one
# query for each sequence, so the context is cut instead: one part for each processor, and a small second step that joins
# them (**Flash-Decoding**, exercise 1).
#
# ## The code
#
# The paper's algorithm in plain PyTorch, over the blocks of the cache (`attention_backend=naive`). The loop over `j` is the
# one above; it ends at the diagonal:

# %%
show_source(attend_blocks)

# %% [markdown]
# K and V are stored first, then every sequence walks its own block table:

# %%
show_source(FlashAttention.attend, flash_attention)

# %% [markdown]
# What m3 does in every layer of every step, and m4 no longer does; then the step that joins the parts of a decode, from the
# CPU's kernel (`exp2`, with scores multiplied by log₂ e, is cheaper than `exp`):

# %%
show_source(GatherAttention._gather, cpu_decode._join.py_func)

# %% [markdown]
# Scheduler, KV cache and block tensors are m3's. `make stage4 diff` shows it.
#
# ## Measured against m3
#
# The same prompts on m4, without its compiled kernels between the matrix products, which are not attention's.

# %%
NOTHING_ELSE = {"fused_kernels": False}
m4 = measure_prompts("m4", LENGTHS, **NOTHING_ELSE)
compare(
    [m3[-1], m4[-1]],
    "first token",
    attention=lambda r: seconds(r.attention_time_s),
    share_of_the_run=lambda r: f"{r.attention_time_s / r.e2e_s['max']:.0%}",
    activations=lambda r: written(r.peak_activation_bytes),
)

# %% [markdown]
# And decoding, where each of 16 requests has one query and about 150 tokens behind it:

# %%
batch = Size(uniform(16, (128, 128), (32, 32)), max_num_seqs=16, max_model_len=192)
decode = [measure(stage, batch, **NOTHING_ELSE) for stage in ("m3", "m4")]
compare(decode, "output tokens/s", "each further token")

# %% [markdown]
# ## The picture

# %%
figure, axes = plt.subplots(1, 2, figsize=(14, 5))
panels = {
    "time in attention, s": lambda r: r.attention_time_s,
    "peak memory of activations, MB": lambda r: (r.peak_activation_bytes or 0) / 1e6,
}
for axis, (heading, value) in zip(axes, panels.items(), strict=True):
    draw_lines(axis, heading, {records[0].stage: (LENGTHS, [value(r) for r in records]) for records in (m3, m4)})
    axis.set(xlabel="tokens of the prompt", xticks=LENGTHS)
figure.tight_layout(w_pad=4)
plt.show()
faster = m3[-1].attention_time_s / m4[-1].attention_time_s
shorter = m3[-1].ttft_s["p50"] / m4[-1].ttft_s["p50"]
decoding = decode[1].output_tokens_per_s / decode[0].output_tokens_per_s
grown = m4[-1].attention_time_s / m4[-2].attention_time_s
say(f"""
At {LENGTHS[-1]:,} tokens attention takes **{1 / faster:.0%} of m3's time**, and TTFT is **{shorter:.1f} times
shorter**. 16 decodes together, which gather nothing now, run at {decoding:.2f} times the speed. Memory no longer grows with the
square of the length. The arithmetic still does, as every query is compared with every key: from {LENGTHS[-2]:,} to
{LENGTHS[-1]:,} tokens the time in attention grew {grown:.1f} times, m3's {growth:.1f} times.
""")

# %% [markdown]
# ## Where it loses
#
# How much of this is the algorithm, and how much the kernel? The same engine with its other backends: `naive` is the
# algorithm in PyTorch, where each tile is a tensor in memory; `torch` gathers like m3 and calls PyTorch's fused kernel.

# %%
prompt = Size(uniform(1, (768, 768), (16, 16)), max_num_seqs=1, max_model_len=784)
backends = {"m3, the full formula": m3[LENGTHS.index(768)]}
for name in ("naive", "torch"):
    backends[f"m4, `{name}`"] = measure("m4", prompt, attention_backend=name, **NOTHING_ELSE)
backends["m4, `cpu`"] = m4[LENGTHS.index(768)]
rows = [(name, seconds(r.ttft_s["p50"]), seconds(r.itl_s["p50"])) for name, r in backends.items()]
table(["768 tokens in", "first token", "each further token"], rows)


# %%
def lines_of(*objects):
    return sum(bool(line.strip()) for one in objects for line in inspect.getsource(one).splitlines())


records = json.loads((ROOT / "reports/h100/attention.json").read_text())["records"]
one_prompt = {r["backend"]: r["seconds"] for r in records if (r["sequences"], r["queries"]) == (1, 16384)}
decodes = {(r["step"], r["backend"]): r["seconds"] for r in records if r["kind"] == "decode"}
ahead = [ours < decodes[step, "torch"] for (step, backend), ours in decodes.items() if backend == "triton"]
short_share = m3[0].attention_time_s / m3[0].e2e_s["max"]
say(f"""
- **Short contexts gain less.** With {LENGTHS[0]} tokens attention was {short_share:.0%} of m3's run; no kernel can save more.
- **Code.** `full_attention` is {lines_of(full_attention)} lines. The two CPU kernels and their vector operations are
  {lines_of(cpu_decode, cpu_prefill, simd)}, and a GPU needs others.
- **Compilation.** The first use of a kernel on a machine takes some seconds; it is cached afterwards.
- **Libraries may be better.** On the H100 of our reports one prompt of 16,384 tokens takes our Triton kernel
  {seconds(one_prompt["triton"])}, gathering plus PyTorch's kernel {seconds(one_prompt["torch"])}. Of {len(ahead)} decodes
  measured there, ours is faster in {sum(ahead)}.
- **The KV cache is as large as before:** {kv_bytes_per_token(config, torch.bfloat16):,} bytes a token.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: join two parts
#
# Two processors have each gone through a part of a context, for the same query. A part is `(m, l, acc)` as above, with `acc`
# not divided yet. Return the part for both.


# %% tags=["exercise"]
def merge(one, other):
    m = torch.maximum(one[0], other[0])
    return m, one[1] + other[1], one[2] + other[2]


check.merge(merge)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Each part's sums are relative to its own maximum. Bring both to the common one.
# ```python
# def merge(one, other):
#     m = torch.maximum(one[0], other[0])
#     first, second = (one[0] - m).exp(), (other[0] - m).exp()
#     return m, first * one[1] + second * other[1], first * one[2] + second * other[2]
# ```
# </details>
#
# ### Exercise 2: how large are the scores?
#
# How many bytes are the scores of one layer when `queries` tokens attend to `context` tokens? The check looks at the tensor
# that m3 makes.


# %% tags=["exercise"]
def score_bytes(config, queries, context, bytes_of_a_number):
    return config.num_kv_heads * queries * context * bytes_of_a_number


check.score_bytes(score_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Every query head has its own scores: grouped-query attention makes the cache smaller, not the score matrix.
# ```python
# def score_bytes(config, queries, context, bytes_of_a_number):
#     return config.num_heads * queries * context * bytes_of_a_number
# ```
# </details>
#
# ### Exercise 3: which tiles?
#
# `queries` tokens end a context of `context` tokens. Scores are computed in tiles of `tile` queries by `tile` keys, from the
# first query and the first key on. A tile in which no query may see any key is skipped. How many are computed? The check
# counts them in `flash_attention`.


# %% tags=["exercise"]
def tiles(queries, context, tile):
    return -(-queries // tile) * -(-context // tile)  # -(-a // b) is a / b, rounded up


check.tiles(tiles)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The last query of a tile sees the most: all keys up to its own position.
# ```python
# def tiles(queries, context, tile):
#     count = 0
#     for first in range(0, queries, tile):
#         last = min(first + tile, queries)
#         seen = context - queries + last
#         count += -(-seen // tile)
#     return count
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
moved = bytes_moved(LENGTHS[-1])
say(f"""
- **Q6: why is FlashAttention fast?** Not because it computes less. For {LENGTHS[-1]:,} tokens a layer's inputs and outputs are
  {written(moved[0])}, and its scores, moved four times, {written(moved[1])}. Tiles keep them in fast memory: here attention
  takes {1 / faster:.0%} of the time.
- **Q6, follow-up: how can softmax go by tiles?** A running maximum, and sums that shrink when it rises. It is exact: the
  output above differs by {far:.0e}, rounding.
- **Q5 and Q6: how does it go together with paged KV?** The kernel looks up a tile's blocks in the block table. m3 gathers every
  context in every layer of every step; without that, 16 decodes run {decoding:.2f} times as fast.
- **Q12: does it make long contexts cheap?** In memory, but not in arithmetic: twice the prompt ({LENGTHS[-1]:,} tokens) took
  {grown:.1f} times as long in m4's attention. And the KV cache still grows with every token.
""")
