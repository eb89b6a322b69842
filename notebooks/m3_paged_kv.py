# %% [markdown]
# # m3: the paged KV cache
#
# m2 reserves room for the longest possible request. m3 gives a request small blocks, one by one, as it grows: paging, as in
# operating systems.
#
# You need: `m2_continuous_batching`. About 25 minutes.

# %% tags=["setup"]
from benchmarks.plots.memory_map import memory_map_figure
from benchmarks.recipes import uniform
from benchmarks.table import rate, seconds
from benchmarks.trace import record
from benchmarks.workloads import Size
from notebooks.checks import m3 as check
from notebooks.kit import HERE, change, compare, measure, say, show_picture, show_source, table
from stages.m3_paged_kv.attention import GatherAttention
from stages.m3_paged_kv.block_pool import BlockPool
from stages.m3_paged_kv.kv_cache import PagedCache
from stages.m3_paged_kv.preemption import Preemption

import torch

# %% [markdown]
# ## The problem
#
# 24 requests of 24 to 56 tokens in and out, an engine that allows 512 tokens a request, and the KV memory of three such
# requests. On m2:

# %%
pressure = Size(uniform(24, (24, 56), (24, 56)), max_num_seqs=24, max_model_len=512, kv_tokens=3 * 512)
m2 = measure("m2", pressure)
say(f"""
**{m2.peak_running} requests run at once**, and the median one waits {seconds(m2.ttft_s["p50"])} for its first token. Yet the
memory is nearly empty: of what is reserved, **{m2.kv_utilization:.0%} holds a token**.
""")

# %% [markdown]
# ## The idea
#
# The length of an answer is known only at its end. So take what is needed *now*. Cut the memory into blocks of 16 token slots,
# and keep for each request a **block table**: the list of its blocks, in order.

# %%
BLOCK = 16
free = list(range(12))[::-1]
tables = {"A": [], "B": []}
lengths = {"A": 0, "B": 0}


def append_token(request):
    if lengths[request] == len(tables[request]) * BLOCK:  # the last block is full
        tables[request].append(free.pop())
    lengths[request] += 1


for turn in range(40):
    append_token("A")
    if turn < 20:
        append_token("B")
say(f"""
A has {lengths["A"]} tokens in the blocks {tables["A"]}, B has {lengths["B"]} in {tables["B"]}. Token 35 of A lies in block
{tables["A"][35 // BLOCK]}, at offset {35 % BLOCK}. {sum(len(t) * BLOCK - lengths[r] for r, t in tables.items())} slots are empty:
the tails of two last blocks.
""")

# %% [markdown]
# Attention needs the keys in order, so it reads them through the table. Indexing does it:

# %%
memory = torch.zeros(12, BLOCK, 64)  # keys of one layer and one head, all requests
keys = torch.randn(lengths["A"], 64)
for position, key in enumerate(keys):
    memory[tables["A"][position // BLOCK], position % BLOCK] = key
gathered = memory[torch.tensor(tables["A"])].flatten(0, 1)[: lengths["A"]]
say(f"Gathered through the table, A's keys are those that were stored: **{torch.equal(gathered, keys)}**.")

# %% [markdown]
# Two benefits follow. All blocks have one size, so any free block fits (no external fragmentation). And two requests with the
# same beginning can point at the *same* block, with a count of owners; a request that writes into a shared block first takes
# a copy (*copy on write*).
#
# ## The code
#
# The pool is forty lines: a free list, and how many owners each block has.

# %%
show_source(BlockPool.take, BlockPool.share, BlockPool.release)

# %% [markdown]
# `grow`: how many blocks are missing, and which of those about to be written have other owners?

# %%
show_source(PagedCache.blocks_for, PagedCache.grow)

# %% [markdown]
# If a request cannot grow, the least urgent one is preempted: its blocks are swapped to a pool on the CPU if that has room,
# otherwise they are freed and recomputed later.

# %%
show_source(Preemption.make_room, Preemption.preempt)

# %% [markdown]
# Attention, the plain way, gathers each context into a copy before it computes. m4 reads the blocks in place.

# %%
show_source(GatherAttention._gather)

# %% [markdown]
# ## Measured against m2
#
# The same requests, in the same bytes:

# %%
m3 = measure("m3", pressure)
shown = ("requests at once", "KV slots filled", "output tokens/s", "first token", "end, mean")
compare([m2, m3], *shown, preemptions=lambda r: r.preemptions)
gain = m3.output_tokens_per_s / m2.output_tokens_per_s

# %% [markdown]
# ## The picture
#
# The KV memory when most requests run, in the scenario of `make stage3 trace`: sixteen requests, the memory of two slots.

# %%
show_picture(lambda: memory_map_figure([record(stage, **HERE) for stage in ("m2", "m3")]))
say(f"""
In the measurement above: **{m3.peak_running / m2.peak_running:.0f} times** as many requests at once, **{gain:.1f} times** the
tokens a second. Attention did not get faster: more requests share the weights in each step.
""")

# %% [markdown]
# ## Where it loses
#
# **Attention copies** each context before it reads it. Where memory is not short, that is all that differs from m2. **Blocks
# have a size**: small ones waste little and need long tables; large ones waste their tails. And **a pool that is too small**
# has to preempt.

# %%
even = Size(uniform(8, (96, 96), (32, 32)), max_num_seqs=8, max_model_len=128)
even2, even3 = measure("m2", even), measure("m3", even)
sizes = (4, 16, 128)
little = Size(uniform(12, (24, 56), (16, 24)), 12, 512, kv_tokens=3 * 512)
swept = {size: measure("m3", little, block_size=size) for size in sizes}
scarce = measure("m3", Size(uniform(8, (24, 32), (64, 80)), max_num_seqs=8, max_model_len=128, kv_tokens=5 * 64))
rows = [(n, r.peak_running, f"{r.kv_utilization:.0%}", rate(r.output_tokens_per_s)) for n, r in swept.items()]
table(["block size", "requests at once", "filled", "output tokens/s"], rows)
before, after = even2.output_tokens_per_s, even3.output_tokens_per_s
verdict = (
    "The copies cost that much here" if after < 0.98 * before else "What the copies cost does not show in one run here"
)
say(f"""
- Eight equal requests, room for all: m2 {rate(before)}, m3 {rate(after)} output tokens a second
  ({change(after, before)}). {verdict}; the [README of m3](../stages/m3_paged_kv/README.md) has longer runs, and a GPU's.
- Eight requests that grow to about 100 tokens each, in 320 slots: **{scarce.preemptions} preemptions**, and
  {rate(scarce.output_tokens_per_s)} tokens a second.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: where does a token lie?
#
# Slot `s` is token `s % block_size` of block `s // block_size`. In which slot does token `position` of a request lie?


# %% tags=["exercise"]
def slot(block_table, position, block_size):
    return block_table[0] * block_size + position


check.slot(slot)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The start takes the blocks to be neighbours; the table says where each of them is.
# ```python
# def slot(block_table, position, block_size):
#     return block_table[position // block_size] * block_size + position % block_size
# ```
# </details>
#
# ### Exercise 2: when is a block missing?
#
# A request holds `held` blocks and needs room for its first `tokens` tokens. How many blocks does it lack?


# %% tags=["exercise"]
def missing_blocks(held, tokens, block_size):
    return 1 if tokens % block_size == 1 else 0


check.missing_blocks(missing_blocks)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The start is right for one token after another, but not for a prompt, after a preemption, or for chunks. Subtract what is
# held from what is needed, rounded up.
# ```python
# def missing_blocks(held, tokens, block_size):
#     return max(0, -(-tokens // block_size) - held)
# ```
# </details>
#
# ### Exercise 3: copy on write
#
# A request is about to write into its block `table[index]`, which others may hold as well. Make it a block that the request
# may write into. `pool` has `take(count)`, `release(blocks)`, `ref_counts`. (The numbers are copied elsewhere.)


# %% tags=["exercise"]
def write(pool, table, index):
    [table[index]] = pool.take(1)


check.write(write)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Copy only what is shared, and give the original back: otherwise it is never free again.
# ```python
# def write(pool, table, index):
#     if pool.ref_counts[table[index]] > 1:
#         [copy] = pool.take(1)
#         pool.release([table[index]])
#         table[index] = copy
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q5: how does PagedAttention work?** A pool of blocks, a block table for each request, attention that reads through the table.
  In the same bytes {m3.peak_running} requests ran instead of {m2.peak_running}.
- **Q15: how does it reduce fragmentation?** What is reserved is filled to {m3.kv_utilization:.0%} instead of
  {m2.kv_utilization:.0%}: only the tail of each last block is empty, and every free block fits.
- **Follow-up 2: how do you choose the block size?** Tail waste against table length: blocks of {sizes[0]}, {sizes[1]} and
  {sizes[2]} were filled to {", ".join(f"{r.kv_utilization:.0%}" for r in swept.values())}.
- **Follow-up 4: what happens when memory runs out?** Admission waits for free blocks; if growth fails anyway, the least urgent
  request is preempted ({scarce.preemptions} times above). A request that can never fit is refused when it is added.
""")
