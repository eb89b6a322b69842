# %% [markdown]
# # m4: flash attention
#
# m3 computes softmax(Q Kᵀ) V as it is written: scores of all queries and all keys, in memory. m4 computes the same
# numbers and never has that matrix. And it reads the blocks where they lie, instead of copying them together first.
#
# You need: `m3_paged_kv`, and softmax. About 30 minutes.

# %% tags=["setup"]
import stages  # noqa: F401 - first: it bounds how long idle threads spin, before PyTorch is loaded

# isort: split
import inspect
import json

import matplotlib.pyplot as plt
import torch

from benchmarks.recipes import uniform
from benchmarks.style import color, title
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from benchmarks.workloads import Size
from common.execution.cpu import simd
from common.memory import kv_bytes_per_token
from common.models.load import open_source
from notebooks.checks import m4 as check
from notebooks.kit import HERE, ROOT, compare, measure, measure_prompts, say, show_source, table
from stages.m2_continuous_batching.attention import full_attention
from stages.m3_paged_kv.attention import GatherAttention
from stages.m4_flash_attention.attention import FlashAttention, attend_blocks, flash_attention
from stages.m4_flash_attention.fast.kernels import cpu_decode, cpu_prefill

# %% [markdown]
# ## The problem
#
# Prompts of different lengths on m3, one at a time, 16 tokens out. Each length is twice the one before.

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

# %%
growth = m3[-1].attention_time_s / m3[-2].attention_time_s
say(f"""
Twice the prompt is four times the scores. From {LENGTHS[-2]:,} to {LENGTHS[-1]:,} tokens the time in attention grew
**{growth:.1f} times**, and of the time to the first token it is by then most. Activations follow the scores. (Those are
{config.num_heads} heads × queries × keys, here at 2 bytes a number; the softmax makes a copy in float32 besides.) At
the model's limit of {config.max_position_embeddings:,} tokens the scores of *one layer* would be
{written(2 * config.num_heads * config.max_position_embeddings**2)}.
""")

# %% [markdown]
# Is it the arithmetic? Each score costs as many multiplications as a head is wide, twice. But the matrix is also
# written, read for the softmax, written again, and read once more for the product with V. Let us count what has to
# move:


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
# Nobody asked for the scores. Only the output is wanted, and that is small.
#
# ## The idea
#
# Softmax seems to need its whole row at once: the maximum, then the sum. It does not. Walk over the keys in tiles and
# keep three things for each query: the largest score so far, the sum of exponentials relative to it, and the sum over V
# with these weights. When a tile brings a larger score, what was summed before is multiplied by exp(old maximum − new
# one). That is the **online softmax**.
#
# And if a tile is a block of m3, the walk can follow the block table. Here is one query of one head:

# %%
torch.manual_seed(127)
BLOCK, DIM, LENGTH = 16, 64, 60
block_table = [5, 0, 3, 6]
key_blocks, value_blocks = torch.randn(2, 8, BLOCK, DIM)
q = 2 * torch.randn(DIM)


def gathered():
    """As m3 does it: copy the context together, then softmax over all of it."""
    keys, values = (blocks[block_table].flatten(0, 1)[:LENGTH] for blocks in (key_blocks, value_blocks))
    return (keys @ q * DIM**-0.5).softmax(0) @ values


def in_place():
    """Block by block; at most BLOCK scores exist at a time. Returns the output, and what was kept after each block."""
    top, weight, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(DIM)
    seen = []
    for i, block in enumerate(block_table):
        held = min(BLOCK, LENGTH - i * BLOCK)  # the last block may not be full
        scores = key_blocks[block, :held] @ q * DIM**-0.5
        new_top = torch.maximum(top, scores.max())
        shrink = (top - new_top).exp()
        weights = (scores - new_top).exp()
        weight = weight * shrink + weights.sum()
        out = out * shrink + weights @ value_blocks[block, :held]
        top = new_top
        seen.append((block, f"{scores.max():.2f}", f"{top:.2f}", f"{shrink:.3f}", f"{weight:.2f}"))
    return out / weight, seen


output, seen = in_place()
far = (output - gathered()).abs().max().item()
table(["block", "its largest score", "largest so far", "older sums shrink by", "sum of weights"], seen)
say(f"The two outputs differ by at most **{far:.0e}**: what rounding leaves.")

# %% [markdown]
# A prefill does this for a tile of queries at once, so that a tile of K and V is read once for all of them. A decode
# has one query for each sequence. There the context is cut instead: one part for each processor, each with its own
# maximum and sums, and a small second step that joins them (**Flash-Decoding**). Exercise 1 is that step.
#
# ## The code
#
# The stage itself is the paper's algorithm in plain PyTorch, over the blocks of the cache. It runs with
# `attention_backend=naive`. The loop over `j` is the one above; it ends at the diagonal:

# %%
show_source(attend_blocks)

# %% [markdown]
# Storing comes first, then every sequence walks its own block table:

# %%
show_source(FlashAttention.attend, flash_attention)

# %% [markdown]
# Here is what m3 does in every layer of every step, and what m4 no longer does:

# %%
show_source(GatherAttention._gather)

# %% [markdown]
# And the step that joins the parts of a decode, from the CPU's kernel (`exp2` instead of `exp`: it is cheaper, and the
# scores were multiplied by log₂ e before):

# %%
show_source(cpu_decode._join.py_func)

# %% [markdown]
# Scheduler, KV cache and block tensors are m3's. `make stage4 diff` shows it.
#
# ## Measured against m3
#
# The same prompts on m4. Between the matrix products it has compiled kernels as well; they are none of attention's
# doing, and off here.

# %%
NOTHING_ELSE = {"fused_kernels": False}
m4 = measure_prompts("m4", LENGTHS, **NOTHING_ELSE)
compare(
    [m3[-1], m4[-1]],
    first_token=lambda r: seconds(r.ttft_s["p50"]),
    attention=lambda r: seconds(r.attention_time_s),
    share_of_the_run=lambda r: f"{r.attention_time_s / r.e2e_s['max']:.0%}",
    activations=lambda r: written(r.peak_activation_bytes),
)

# %% [markdown]
# And decoding, where each of 16 requests has one query and about 150 tokens behind it:

# %%
batch = Size(uniform(16, (128, 128), (32, 32)), max_num_seqs=16, max_model_len=192)
decode = [measure(stage, batch, **NOTHING_ELSE) for stage in ("m3", "m4")]
compare(
    decode,
    output_tokens_per_s=lambda r: rate(r.output_tokens_per_s),
    a_step=lambda r: seconds(r.itl_s["p50"]),
)

# %% [markdown]
# ## The picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
for records in (m3, m4):
    name = records[0].stage
    attention = [r.attention_time_s for r in records]
    memory = [(r.peak_activation_bytes or 0) / 1e6 for r in records]
    for axis, values in ((left, attention), (right, memory)):
        axis.plot(LENGTHS, values, marker="o", linewidth=3, color=color(name))
        axis.annotate(
            title(name), (LENGTHS[-1], values[-1]), xytext=(-12, 8), textcoords="offset points", color=color(name),
            fontweight="bold", ha="right",
        )  # fmt: skip
left.set_title("time in attention, in seconds (less is better)", loc="left")
right.set_title("memory of activations at the peak, in MB", loc="left")
for axis in (left, right):
    axis.set(xlabel="tokens of the prompt", xticks=LENGTHS, ylim=(0, 1.15 * axis.get_ylim()[1]))
    axis.grid(axis="y", color="#E4E4E4")
figure.tight_layout(w_pad=4)
plt.show()

# %%
faster = m3[-1].attention_time_s / m4[-1].attention_time_s
sooner = m3[-1].ttft_s["p50"] / m4[-1].ttft_s["p50"]
decoding = decode[1].output_tokens_per_s / decode[0].output_tokens_per_s
grown = m4[-1].attention_time_s / m4[0].attention_time_s, (LENGTHS[-1] / LENGTHS[0]) ** 2
say(f"""
At {LENGTHS[-1]:,} tokens attention takes **1/{faster:.0f} of the time**, and the first token comes **{sooner:.1f} times
sooner**. 16 decodes together run at {decoding:.2f} times the speed, because nothing is gathered. The memory no longer
has anything to do with the square; the *time* still has: every query is held against every key, as before.
""")

# %% [markdown]
# ## Where it loses
#
# How much of this is the algorithm, and how much the kernel? Here is the same engine with its other backends. `naive` is
# the algorithm in PyTorch, where each tile is a tensor in memory and each line of the loop a call. `torch` gathers like
# m3 and calls PyTorch's own fused kernel.

# %%
prompt = Size(uniform(1, (768, 768), (16, 16)), max_num_seqs=1, max_model_len=784)
backends = {"m3, the full formula": m3[LENGTHS.index(768)]}
for name in ("naive", "torch"):
    backends[f"m4, `{name}`"] = measure("m4", prompt, attention_backend=name, **NOTHING_ELSE)
backends["m4, `cpu`"] = m4[LENGTHS.index(768)]
table(
    ["768 tokens in", "first token", "each further token"],
    [
        (name, seconds(r.ttft_s["p50"]), seconds(r.itl_s["p50"]))
        for name, r in backends.items()
    ],
)  # fmt: skip


# %%
def lines_of(*objects):
    return sum(bool(line.strip()) for one in objects for line in inspect.getsource(one).splitlines())


records = json.loads((ROOT / "reports/h100/attention.json").read_text())["records"]
one_prompt = {r["backend"]: r["seconds"] for r in records if (r["sequences"], r["queries"]) == (1, 16384)}
short_share = m3[0].attention_time_s / m3[0].e2e_s["max"]
say(f"""
- **Short contexts gain less.** With {LENGTHS[0]} tokens attention was {short_share:.0%} of m3's run. Whatever a kernel
  does, it cannot save more.
- **Code.** `full_attention` is {lines_of(full_attention)} lines. The two CPU kernels and their vector operations are
  {lines_of(cpu_decode, cpu_prefill, simd)}, and a GPU needs others.
- **Compilation.** The first use of a kernel on a machine takes some seconds; it is cached afterwards.
- **Libraries may be better.** On the H100 of our reports one prompt of 16,384 tokens takes our Triton kernel
  {seconds(one_prompt["triton"])}, and gathering plus PyTorch's kernel {seconds(one_prompt["torch"])}. At every decode
  ours is the faster one.
- **The KV cache is as large as before:** {kv_bytes_per_token(config, torch.bfloat16):,} bytes a token. What m4 removes
  is what attention needed *besides*.
""")

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: join two parts
#
# Two processors have each gone through a part of a context, for the same query. A part is `(top, weight, out)`: its
# largest score; the sum of exp(score − top); and the sum over V with these weights, not divided yet. Return the part
# that stands for both.


# %% tags=["exercise"]
def merge(one, other):
    top = torch.maximum(one[0], other[0])
    return top, one[1] + other[1], one[2] + other[2]


check.merge(merge)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Each part's sums are relative to its own maximum. Bring both to the common one; it is the shrinking of the online
# softmax, for both sides.
#
# ```python
# def merge(one, other):
#     top = torch.maximum(one[0], other[0])
#     first, second = (one[0] - top).exp(), (other[0] - top).exp()
#     return top, first * one[1] + second * other[1], first * one[2] + second * other[2]
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: how large are the scores?
#
# In m1 only the KV heads counted, because only K and V are stored. And the scores of one layer, in bytes, when
# `queries` tokens look at `context` tokens? The check looks at the tensor that m3 makes.


# %% tags=["exercise"]
def score_bytes(config, queries, context, bytes_of_a_number):
    return config.num_kv_heads * queries * context * bytes_of_a_number


check.score_bytes(score_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Every query head has scores of its own, though several share a KV head. Grouped-query attention makes the cache
# smaller, not the score matrix.
#
# ```python
# def score_bytes(config, queries, context, bytes_of_a_number):
#     return config.num_heads * queries * context * bytes_of_a_number
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: which tiles?
#
# `queries` tokens stand at the end of a context of `context` tokens. Scores are computed in tiles of `tile` queries by
# `tile` keys, the first tile of each beginning at the first query and the first key. A tile behind the diagonal, where
# no query may see any key, is skipped. How many are computed? The check counts them in `flash_attention`.


# %% tags=["exercise"]
def tiles(queries, context, tile):
    return -(-queries // tile) * -(-context // tile)  # -(-a // b) is a / b, rounded up


check.tiles(tiles)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The last query of a tile sees the most: everything up to its own position.
#
# ```python
# def tiles(queries, context, tile):
#     count = 0
#     for first in range(0, queries, tile):
#         last = min(first + tile, queries)
#         seen = context - queries + last
#         count += -(-seen // tile)
#     return count
# ```
#
# </details>

# %% [markdown]
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
moved = bytes_moved(LENGTHS[-1])
say(f"""
- **Q6: why is FlashAttention fast?** Not because it computes less. For {LENGTHS[-1]:,} tokens a layer's inputs and
  outputs are {written(moved[0])}, and its scores, moved four times, {written(moved[1])}. Tiles keep them in fast
  memory. Here that makes attention {faster:.0f} times faster, and the first token {sooner:.1f} times.
- **Q6, follow-up: how can softmax go by tiles?** Online: a running maximum, and sums that shrink when it rises. The
  output above differs by {far:.0e} from the full formula's. It is exact, not an approximation.
- **Q6, follow-up: what about recomputation?** That is for training, where the backward pass needs the scores again.
  Inference recomputes nothing; it corrects sums.
- **Q6, the table in many guides: O(n²/M) accesses?** The paper's theorem says O(n² d² / M), against O(n d + n²): d is
  the head's width, M the size of the fast memory. The space is O(n): from {LENGTHS[0]} to {LENGTHS[-1]:,} tokens the
  activations of m4 went from {written(m4[0].peak_activation_bytes)} to {written(m4[-1].peak_activation_bytes)}, those
  of m3 from {written(m3[0].peak_activation_bytes)} to {written(m3[-1].peak_activation_bytes)}.
- **Q5 and Q6: how does it go together with paged KV?** A tile's blocks are looked up in the block table, inside the
  kernel. m3 copied the context of everyone together in every layer of every step; without that, 16 decodes run
  {decoding:.2f} times as fast.
- **Q12: does it make long contexts cheap?** It takes the square out of the memory, not out of the time: for
  {grown[1]:.0f} times the scores, m4's attention took {grown[0]:.0f} times as long. And the KV cache still grows with
  every token.
""")
