# %% [markdown]
# # m6: prefix caching
#
# Most prompts begin like others: the same system prompt, the same examples, the conversation so far. m5 computes that
# beginning every time; m6 computes it once and finds it again.
#
# You need: `m3_paged_kv`. About 30 minutes.

# %% tags=["setup"]
from itertools import pairwise

import stages
from benchmarks.plots.prefix_tree import prefix_tree_figure
from benchmarks.prefixes import record_prefixes
from benchmarks.recipes import chats
from benchmarks.table import count, seconds
from benchmarks.workloads import Size
from common import SamplingParams
from common.memory import kv_bytes_per_token
from common.models.load import load_tokenizer
from notebooks.checks import m6 as check
from notebooks.kit import HERE, change, compare, draw_lines, measure, say, show_source, table
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.hash_index import HashIndex, _is, chain_hash
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache

import matplotlib.pyplot as plt

# %% [markdown]
# ## The problem
#
# One chat on m5, five turns, with a system prompt of 640 tokens. A turn's prompt is all that was said so far and a new message
# of about 40 tokens. (`chats` is a recipe of the benchmark.)

# %%
PREFIX, TURNS = 640, 5


def chat(share=None):
    """share: how much of each prompt is what was said before; None: all but the new message."""
    recipe = chats(1, TURNS, PREFIX, messages=(32, 48), outputs=(16, 16), gap=0.0, share=share)
    return Size(recipe, max_num_seqs=1, max_model_len=1024)


m5 = measure("m5", chat())
asked = [request.prompt_length for request in chat().requests(100) if not request.warm]
new = asked[0] - PREFIX + sum(b - a - 16 for a, b in pairwise(asked))
say(f"""
The user waits **{seconds(m5.ttft_s["p50"])}** for each first token, in the last turn
{seconds(m5.ttft_by_group[f"turn {TURNS}"]["p50"])}. The prompts had {sum(asked):,} tokens together, of which the user wrote {new:,}.
The K and V of all others, **{1 - new / sum(asked):.0%}**, had been computed before: they depend only on the tokens up to them.
""")

# %% [markdown]
# ## The idea
#
# m3's blocks can have several owners. What is missing is a way to *find* a block. By its tokens? Not quite:

# %%
tokenizer = load_tokenizer(HERE["model"])
BLOCK = 4


def blocks_of(text):
    ids = tokenizer.encode(text)
    return [tuple(ids[start : start + BLOCK]) for start in range(0, len(ids) // BLOCK * BLOCK, BLOCK)]


sentence = "The court {} that the red house on the hill is mine, and so is the garden behind it."
says, denies = blocks_of(sentence.format("says")), blocks_of(sentence.format("denies"))
same = [one for one in says if one in denies]
say(f"""
In blocks of {BLOCK} tokens these two sentences have **{len(same)}** of {len(says)} blocks in common:
{", ".join(f"`{tokenizer.decode(list(block))}`" for block in same)}. Their K and V differ: what comes before them differs.
""")

# %% [markdown]
# A block is identified by its tokens **and the block before it**. So let the key of a block be a hash of the key before and
# its own tokens. One key then represents everything from the first token on:


# %%
def keys_of(blocks, salt=None):
    keys, key = [], hash(salt)
    for block in blocks:
        key = hash((key, block))
        keys.append(key)
    return keys


class ToyCache:
    """A dictionary from keys to block numbers; reference counts; and the idle keys, least recently released first."""

    def __init__(self, num_blocks):
        self.blocks, self.owners, self.empty, self.idle = {}, {}, list(range(num_blocks)), []

    def start(self, keys):
        """Blocks for a prompt: those that are found, up to the first that is not, and new ones."""
        table, found = [], 0
        for key in keys:
            if found == len(table) and key in self.blocks:
                found += 1
                if self.owners[key] == 0:
                    self.idle.remove(key)
            else:
                if not self.empty:  # evict the least recently released block
                    oldest = self.idle.pop(0)
                    self.empty.append(self.blocks.pop(oldest))
                self.blocks[key], self.owners[key] = self.empty.pop(0), 0
            self.owners[key] += 1
            table.append(self.blocks[key])
        return table, found

    def end(self, keys):
        """The blocks stay, to be found again. The end of a prompt is released before its beginning."""
        for key in reversed(keys):
            self.owners[key] -= 1
            if self.owners[key] == 0:
                self.idle.append(key)


system = "You are a helpful assistant. Answer in one short sentence, and say so when you do not know. "
cache, rows = ToyCache(num_blocks=16), []
cats, dogs, moon = "What does a cat eat in winter?", "What does a dog eat in winter?", "How far away is the moon?"
for question, salt in ((cats, None), (dogs, None), (moon, None), (cats, "Eve")):
    keys = keys_of(blocks_of(system + question), salt)
    block_table, found = cache.start(keys)
    rows.append((question, salt or "–", f"{found} of {len(keys)}", " ".join(map(str, block_table))))
    cache.end(keys)
table(["question behind the system prompt", "salt", "blocks found", "block table"], rows)

# %% [markdown]
# The first question pays for all. The fourth has the same text as the first, and finds nothing: a *salt* begins another chain,
# for tenants who must not learn from a fast first token what others have asked.
#
# ## The code
#
# The key, and what a hit must satisfy. A hash alone is never trusted: the block's tokens are compared, and its parent by
# identity, which covers the whole prefix:

# %%
show_source(chain_hash, _is, HashIndex.find)

# %% [markdown]
# At admission a request walks along the chain. `_usable` leaves out the last token, whose logits choose the first new token.

# %%
show_source(PrefixPagedCache._match, PrefixPagedCache._usable)

# %% [markdown]
# A released block that is in the index stays. Empty blocks are taken first, then the least recently released one:

# %%
show_source(BlockPool.release, BlockPool._evict)

# %% [markdown]
# A request that holds a block also holds the one before it, and ends of tables are released before beginnings. So the least
# recently released block never has a child in the index, and evicting needs no search. Scheduler and attention are m5's and
# m4's. `make stage6 diff` shows the two files that were rewritten.
#
# ## Measured against m5
#
# The same chat:

# %%
m6 = measure("m6", chat())
compare(
    [m5, m6],
    *("first token", "each further token"),
    first_token_of_the_last_turn=lambda r: seconds(r.ttft_by_group[f"turn {TURNS}"]["p50"]),
    prompt_tokens_cached=lambda r: count(r.tokens_saved),
    hit_rate=lambda r: "–" if r.prefix_hit_rate is None else f"{r.prefix_hit_rate:.0%}",
)

# %% [markdown]
# Sharing saves memory too: six requests at once, with one system prompt.

# %%
system_ids = list(range(1000, 1256))
together = [[*system_ids, *[2000 + number] * 24] for number in range(6)]
held = {}
for stage in ("m5", "m6"):
    with stages.build(stage, **HERE, max_num_seqs=6, max_model_len=320) as engine:
        engine.generate(together, SamplingParams(max_tokens=4, ignore_eos=True))
        held[stage] = engine.metrics()["kv_reserved_peak_bytes"]
block_bytes = 16 * kv_bytes_per_token(engine.runner.model.config, engine.config.torch_dtype)
say(f"""
m5 holds {held["m5"] // block_bytes} blocks, m6 **{held["m6"] // block_bytes}**: the {len(system_ids) // 16} blocks of the system
prompt exist once, although all six start in the same step. A step stores the K and V of all its tokens before it reads any, so
a block can be found as soon as the step is *planned*.
""")

# %% [markdown]
# ## The picture
#
# Left: the chat. Right: the same chat, but only a share of each prompt is what was said before; the rest is new.

# %%
shares = (0.0, 0.5, 0.8)
partly = [measure("m6", chat(share)) for share in shares]
nothing, plain = partly[0], measure("m5", chat(shares[0]))
points = sorted((r.prefix_hit_rate or 0.0, 1e3 * r.ttft_s["p50"]) for r in (*partly, m6))
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
turns = range(1, TURNS + 1)
by_turn = {r.stage: (turns, [1e3 * r.ttft_by_group[f"turn {turn}"]["p50"] for turn in turns]) for r in (m5, m6)}
draw_lines(left, "time to the first token, ms", by_turn)
left.set(xlabel="turn of the chat", xticks=turns)
hits, times = zip(*[(100 * rate, time) for rate, time in points], strict=True)
without = ((0, hits[-1]), [1e3 * r.ttft_s["p50"] for r in (plain, m5)])
draw_lines(right, "its median over the turns, ms", {"m5": without, "m6": (hits, times)})
right.set_xlabel("share of the prompt in the cache, %")
figure.tight_layout(w_pad=4)
plt.show()

# %% [markdown]
# And the cache after some chats on two tasks with one system prompt: a chain of hashes is a tree. `prefix_index="radix"` stores
# it as one, and then finds matches that end *inside* a block.

# %%
nodes, hit_rate = record_prefixes("m6", **HERE)
prefix_tree_figure(nodes, hit_rate)
plt.show()

# %% [markdown]
# ## Where it loses

# %%
TEXT = (
    4
    * "You are the assistant of a small library. Be polite, be brief, and recommend nothing that is not on the shelf. "
)
one_token = SamplingParams(max_tokens=1)


def cached(engine, prompt):
    [output] = engine.generate([prompt], one_token)
    return output.num_cached_tokens, len(output.prompt_token_ids)


with stages.build("m6", **HERE, max_num_seqs=1, max_model_len=512, kv_cache_memory=24 * block_bytes) as engine:
    cached(engine, TEXT + "Who wrote Emma?")
    again = cached(engine, TEXT + "Who wrote Ulysses?")
    engine.reset_prefix_cache()
    cached(engine, "It is 9:41. " + TEXT + "Who wrote Emma?")
    dated = cached(engine, "It is 9:42. " + TEXT + "Who wrote Ulysses?")
    engine.reset_prefix_cache()
    cached(engine, TEXT + "Who wrote Emma?")
    for stranger in range(4):
        cached(engine, [3000 + stranger] * 100)
    evicted, evictions = cached(engine, TEXT + "Who wrote Ulysses?"), engine.metrics()["evictions"]
say(f"""
- **Nothing in common, nothing gained.** With no shared beginning the first token takes {seconds(nothing.ttft_s["p50"])}, in m5
  {seconds(plain.ttft_s["p50"])} ({change(nothing.ttft_s["p50"], plain.ttft_s["p50"])}, one run each). Planning, with hashes, took m6
  {seconds(nothing.plan_time_s)} in all, m5 {seconds(plain.plan_time_s)}.
- **Only equal *beginnings* count.** The second question after the same system prompt finds {again[0]} of {again[1]} tokens.
  With the time of day before the prompt: **{dated[0]}** of {dated[1]}.
- **Memory decides what is kept.** In a pool of 24 blocks, after four unrelated prompts ({evictions} evictions), the same
  question finds **{evicted[0]}**. Least recently used is not least useful.
- **Decoding stays as it was:** every token still reads all weights and its whole context. {seconds(m6.itl_s["p50"])} for a
  token here, in m5 {seconds(m5.itl_s["p50"])}.
- **A match ends at a block's end.** Larger blocks find less; `radix` copies the part of a block.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: what can be reused?
#
# m6 has served the prompts `earlier` (lists of token ids), one after the other. How many tokens of `prompt` come from the
# cache?


# %% tags=["exercise"]
def reusable(prompt, earlier, block_size):
    def blocks(token_ids):
        return [tuple(token_ids[start : start + block_size]) for start in range(0, len(token_ids), block_size)]

    known = {block for one in earlier for block in blocks(one)}
    return sum(len(block) for block in blocks(prompt) if block in known)


check.reusable(reusable)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Only full blocks count, each only if all before it match, and the last token is always computed, for its logits.
# ```python
# def reusable(prompt, earlier, block_size):
#     known = set()
#     for one in earlier:
#         for end in range(block_size, len(one) + 1, block_size):
#             known.add(tuple(one[:end]))  # the whole prefix, as a chain of hashes
#     end = 0
#     while end + block_size < len(prompt) and tuple(prompt[: end + block_size]) in known:
#         end += block_size
#     return end
# ```
# </details>
#
# ### Exercise 2: how many blocks?
#
# `requests` prompts arrive together. Each begins with the same `shared` tokens, followed by `own` tokens of its own. How many
# blocks do they hold together?


# %% tags=["exercise"]
def blocks_held(requests, shared, own, block_size):
    return requests * -(-(shared + own) // block_size)  # -(-a // b) is a / b, rounded up


check.blocks_held(blocks_held)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Full shared blocks exist once. The block in which the shared part ends differs, so each request has its own.
# ```python
# def blocks_held(requests, shared, own, block_size):
#     once = shared // block_size
#     each = -(-(shared + own) // block_size)
#     return once + requests * (each - once)
# ```
# </details>
#
# ### Exercise 3: what is evicted?
#
# Requests come one after the other, each with a beginning of one block, named by a letter. The cache has room for `room`
# beginnings; when it is full, one is evicted. Say for each request whether its beginning is found.


# %% tags=["exercise"]
def hits(names, room):
    kept, found = [], []
    for name in names:
        found.append(name in kept)
        if name not in kept:
            if len(kept) == room:
                kept.pop(0)  # the oldest
            kept.append(name)
    return found


check.hits(hits)

# %% [markdown]
# <details><summary>Solution</summary>
#
# First in, first out evicts what is always in use. Least recently *used*: a hit makes a beginning the newest again.
# ```python
# def hits(names, room):
#     kept, found = [], []
#     for name in names:
#         found.append(name in kept)
#         if name in kept:
#             kept.remove(name)
#         elif len(kept) == room:
#             kept.pop(0)
#         kept.append(name)
#     return found
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q9: how does prefix caching work?** Full blocks are identified by a chain of hashes. A new request shares the blocks of its
  longest known beginning, and computes the rest. In the chat above {m6.prefix_hit_rate:.0%} of all prompt tokens came from the
  cache, and TTFT is **{m5.ttft_s["p50"] / m6.ttft_s["p50"]:.1f} times shorter**.
- **Q9, a correction: `hash(token_ids[:prefix_len])`?** That hashes the whole prefix again for every block; a chain hashes one
  block each. And a hit is compared, so that a collision never gives a wrong answer.
- **Q9, a correction: copy-on-write?** A full block is never written again, so sharing it needs no copy. Copies are for samples
  of one prompt that diverge (m3), and for matches that end inside a block (`radix`).
- **Q9, follow-up: what does it do for memory?** Six requests with one system prompt of {len(system_ids)} tokens hold
  {held["m6"] // block_bytes} blocks instead of {held["m5"] // block_bytes}.
""")
