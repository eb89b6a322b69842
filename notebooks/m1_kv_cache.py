# %% [markdown]
# # m1: the KV cache
#
# m0 reads the whole text again for every token that it writes. m1 keeps what it has computed. Nothing else changes.
#
# You need: PyTorch, and what a decoder does (`m0_baseline`). About 20 minutes.

# %% tags=["setup"]
from benchmarks.recipes import uniform
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from benchmarks.workloads import Size, find
from common.memory import kv_bytes_per_token
from common.models import load_model, load_tokenizer
from notebooks.checks import m1 as check
from notebooks.kit import HERE, compare, draw_lines, measure, say, show_source
from stages.m0_baseline.scheduler import StaticScheduler
from stages.m1_kv_cache.attention import RowAttention
from stages.m1_kv_cache.kv_cache import RowCache

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The problem
#
# One request on m0: 64 tokens in, 96 out. `measure` is the benchmark's own code, run in this process.

# %%
one_request = Size(uniform(1, (64, 64), (96, 96)), max_num_seqs=1, max_model_len=256)
m0 = measure("m0", one_request)
(early, first_token), (late, last_token) = m0.itl_by_position[0], m0.itl_by_position[-1]
say(f"""
m0 makes **{rate(m0.output_tokens_per_s)} tokens a second**. The token at position {early:.0f} took
{seconds(first_token)}, the one at position {late:.0f} took **{seconds(last_token)}, {last_token / first_token:.1f} times
as long**: each new token costs a pass over all tokens before it.
""")

# %% [markdown]
# ## The idea
#
# What of the last pass could have been kept? Run the model on the same text twice, without its last token and with it.
# It reaches attention only through `attend(layer, q, k, v)`, so a function of our own there sees every layer's keys.

# %%
model = load_model(HERE["model"])  # in float32, to compare exactly
text = load_tokenizer(HERE["model"]).encode("A decoder predicts one token at a time, and each prediction looks back.")


def causal(q, k, v):
    """q [L, Hq, D], k and v [C, Hkv, D], the queries are the last tokens; [L, Hq, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@torch.inference_mode()
def keys_of(token_ids):
    seen = {}

    def attend(layer, q, k, v):
        seen[layer] = k
        return causal(q, k, v)

    model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return seen


short, long = keys_of(text[:-1]), keys_of(text)
difference = max((short[layer] - long[layer][:-1]).abs().max().item() for layer in short)
largest = max(k.abs().max().item() for k in long.values())
say(f"""
The keys of the first {len(text) - 1} tokens, in all {len(short)} layers, with and without the token behind them: the
largest difference is **{difference:.1g}**, of values up to {largest:.0f}: nothing, or what rounding leaves.
""")

# %% [markdown]
# A token sees only the tokens before it, so nothing that comes later changes its keys and values, in any layer: they can be
# kept. Past queries are never used again.
#
# Here is a KV cache. `past` holds keys and values of each layer, and only the new tokens go through the model:


# %%
@torch.inference_mode()
def generate(token_ids, count, cached):
    token_ids, past, positions_computed = list(token_ids), {}, 0

    def attend(layer, q, k, v):
        if cached:
            k, v = (torch.cat(pair) for pair in zip(past.get(layer, (k[:0], v[:0])), (k, v), strict=True))
            past[layer] = k, v
        return causal(q, k, v)

    start = 0
    for _ in range(count):
        new = torch.tensor(token_ids[start:])
        hidden = model(new, torch.arange(start, len(token_ids)), attend)
        positions_computed += len(new)
        start = len(token_ids) if cached else 0
        token_ids.append(int(model.logits(hidden[-1:]).argmax()))
    return token_ids, positions_computed


plain, without_cache = generate(text, 24, cached=False)
kept, with_cache = generate(text, 24, cached=True)
say(f"""
The same 24 tokens: **{plain == kept}**. Positions that went through the model: **{without_cache}** without the cache,
**{with_cache}** with it.
""")

# %% [markdown]
# ## The code
#
# `torch.cat` copies everything for each token. m1 instead allocates rows of `max_model_len` token slots once and writes
# into them. Three places hold the idea. The scheduler is m0's, unchanged; it computes what is not computed yet:

# %%
show_source(StaticScheduler._row)

# %% [markdown]
# m0's cache leaves `num_computed_tokens` at 0 for ever. m1's moves it, in `mark_computed`:

# %%
show_source(RowCache.mark_computed, RowCache.grow)

# %% [markdown]
# Attention stores the new K and V and reads the row. `self._future` hides the slots after each query: they are empty, or
# hold what an earlier request left. `make stage1 diff` shows both files against m0's.

# %%
show_source(RowAttention.attend)

# %% [markdown]
# ## Measured against m0
#
# The same request on m1:

# %%
m1 = measure("m1", one_request)
compare(
    [m0, m1],
    *("output tokens/s", "first token", "each further token"),
    last_tokens=lambda r: seconds(r.itl_by_position[-1][1]),
    KV_bytes_written=lambda r: written(r.kv_used_peak_bytes) if r.kv_used_peak_bytes else "none",
)
speedup = m1.output_tokens_per_s / m0.output_tokens_per_s

# %% [markdown]
# ## The picture

# %%
token_bytes = kv_bytes_per_token(model.config, torch.bfloat16)
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(3, 2))
times = {r.stage: ([p for p, _ in r.itl_by_position], [1e3 * t for _, t in r.itl_by_position]) for r in (m0, m1)}
draw_lines(left, "time of one token in ms, by its position", times)
lengths = (0, 2048, 4096, 8192)
price = {"m1": (lengths, [n * token_bytes / 1e6 for n in lengths])}
draw_lines(right, "its price: KV cache in MB, by tokens kept", price)
right.set_xticks(lengths)
figure.tight_layout(w_pad=6)
plt.show()
grown = {name: y[-1] / y[0] for name, (_, y) in times.items()}
say(f"""
m1 is **{speedup:.1f} times** as fast here. From the first tokens to the last, the time of one grew {grown["m0"]:.1f} times on m0 and
{grown["m1"]:.1f} times on m1. The price is memory: {token_bytes:,} bytes a token ({model.config.num_layers} layers × 2 × {model.config.num_kv_heads} KV heads ×
{model.config.head_dim} × 2 bytes).
""")

# %% [markdown]
# ## Where it loses
#
# Now several requests: the first 12 of the benchmark's `mixed`, four rows at a time (`ladder`).

# %%
ladder = measure("m1", find("ladder").sizes["cpu"])
say(f"""
- A row is reserved for the longest request that might come. Of the slots reserved here, **{ladder.kv_utilization:.0%}**
  hold a token. m3 removes that.
- A batch ends with its longest request. Of all positions computed, **{ladder.padding_share:.0%}** were padding, or rows of
  requests that had ended. m2 removes that.
""")

# %% [markdown]
# And a decode step reads all weights to compute a single token. If it waits for that, further tokens in the same step cost
# next to nothing:

# %%
rows = (1, 2, 4, 8)
batches = [measure("m1", Size(uniform(n, (32, 32), (24, 24)), max_num_seqs=n, max_model_len=128)) for n in rows]
steps = [record.itl_s["p50"] for record in batches]
say(f"""
A step takes {", ".join(f"{seconds(step)} for {n}" for n, step in zip(rows, steps, strict=True))} requests at once:
**{rows[-1]} times the tokens in {steps[-1] / steps[0]:.1f} times the time.** That is why the next stages put requests together.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: how much memory?
#
# Below is the formula most often given in interviews. What must it be for models with grouped-query attention? `config` has
# `num_layers`, `num_heads`, `num_kv_heads`, `head_dim`.


# %% tags=["exercise"]
def kv_bytes(config, num_tokens, bytes_of_a_number):
    hidden_size = config.num_heads * config.head_dim
    return 2 * config.num_layers * hidden_size * num_tokens * bytes_of_a_number


check.kv_bytes(kv_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Only the KV heads are stored: several query heads share each of them.
# ```python
# def kv_bytes(config, num_tokens, bytes_of_a_number):
#     return 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_tokens * bytes_of_a_number
# ```
# </details>
#
# ### Exercise 2: one decode step of attention
#
# `keys` and `values` are a request's row, `[H, slots, D]`. Only the first `length` slots are written; the others hold what an
# earlier request left. Compute the output `[H, D]` of one query `[H, D]`.


# %% tags=["exercise"]
def decode_attention(q, keys, values, length):
    scores = torch.einsum("hd,hsd->hs", q, keys) * q.shape[-1] ** -0.5
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values)


check.decode_attention(decode_attention)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def decode_attention(q, keys, values, length):
#     scores = torch.einsum("hd,hsd->hs", q, keys[:, :length]) * q.shape[-1] ** -0.5
#     return torch.einsum("hs,hsd->hd", scores.softmax(-1), values[:, :length])
# ```
#
# m1 has many rows of different lengths in one tensor, so it cannot cut; it sets the scores of hidden slots to −∞.
#
# </details>
#
# ### Exercise 3: count the work
#
# How many positions go through the model for `prompt` tokens in and `outputs` tokens out, with and without a cache? The
# check counts them on the two engines.


# %% tags=["exercise"]
def positions(prompt, outputs, cached):
    if cached:
        return prompt + outputs
    return sum(prompt + i for i in range(outputs))


check.positions(positions)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The last token is sampled and returned. It would go through the model only to predict the next one.
# ```python
# def positions(prompt, outputs, cached):
#     if cached:
#         return prompt + outputs - 1
#     return sum(prompt + i for i in range(outputs))
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q4: what is a KV cache, and why do we need it?** Keys and values of past tokens never change (above: a difference of
  {difference:.1g}), so a step computes only what is new: {with_cache} positions instead of {without_cache} for 24 tokens.
  Here that is {speedup:.1f} times the speed. The time of a token grew {grown["m1"]:.1f} times with its position, m0's {grown["m0"]:.1f} times.
- **Q4, follow-up: how much memory does it take?** 2 × layers × *KV* heads × head dimension × tokens × bytes, here
  {token_bytes:,} bytes a token. The formula with `hidden_size` gives
  {model.config.num_heads // model.config.num_kv_heads} times as much.
- **Q4: is decoding O(n) now?** The linear layers are. Attention still reads every kept token for each new one.
""")
