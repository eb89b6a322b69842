# %% [markdown]
# # m6: prefix caching
#
# Most prompts begin like others: the same system prompt, the same examples, the conversation so far. m5 computes that
# beginning every time. m6 computes it once, and finds it again.
#
# You need: `m3_paged_kv`. About 30 minutes.

# %% tags=["setup"]
import stages  # first: it bounds how long idle threads spin, before PyTorch is loaded

# isort: split
from itertools import pairwise

import matplotlib.pyplot as plt

from benchmarks.plots.prefix_tree import prefix_tree_figure
from benchmarks.prefixes import record_prefixes
from benchmarks.recipes import chats
from benchmarks.style import color, title
from benchmarks.table import count, seconds
from benchmarks.workloads import Size
from common import SamplingParams
from common.memory import kv_bytes_per_token
from common.models.load import load_tokenizer
from notebooks.checks import m6 as check
from notebooks.kit import HERE, compare, measure, say, show_source, table
from stages.m6_prefix_caching.block_pool import BlockPool
from stages.m6_prefix_caching.hash_index import HashIndex, _is, chain_hash
from stages.m6_prefix_caching.prefix_cache import PrefixPagedCache

# %% [markdown]
# ## The problem
#
# One chat on m5, five turns, on a system prompt of 640 tokens. A turn's prompt is all that was said so far, and a new
# message of about 40 tokens. (`chats` is a recipe of the benchmark.)

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
{seconds(m5.ttft_by_group[f"turn {TURNS}"]["p50"])}. The prompts had {sum(asked):,} tokens together. What the user wrote
were {new:,}. All others, **{1 - new / sum(asked):.0%}**, had been computed before, to the very same numbers: keys and
values of a token depend on nothing but the tokens up to it (`m1_kv_cache` shows it).
""")

# %% [markdown]
# ## The idea
#
# m3's blocks can have several owners. So nothing has to be copied; what is missing is a way to *find* a block. By its
# tokens? Not quite:

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
{", ".join(f"`{tokenizer.decode(list(block))}`" for block in same)}. Their keys and values are *not* the same: every
token there has seen a different beginning.
""")

# %% [markdown]
# A block is known by its tokens **and the block before it**, which is known in the same way. So let the key of a block
# be a hash of the key before and its own tokens. One key then stands for everything from the first token on:


# %%
def keys_of(blocks, salt=None):
    keys, key = [], hash(salt)
    for block in blocks:
        key = hash((key, block))
        keys.append(key)
    return keys


class ToyCache:
    """A dictionary from keys to numbers of blocks; reference counts; and who was released longest ago."""

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
                if not self.empty:  # nobody holds it, and nobody has for the longest time
                    oldest = self.idle.pop(0)
                    self.empty.append(self.blocks.pop(oldest))
                self.blocks[key], self.owners[key] = self.empty.pop(0), 0
            self.owners[key] += 1
            table.append(self.blocks[key])
        return table, found

    def end(self, keys):
        """The blocks stay where they are, to be found again. The end of a prompt goes before its beginning."""
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
# The first question pays for all. The fourth one has the same text as the first, and finds nothing: a *salt* begins
# another chain. Whoever sees how fast a first token comes can guess what others have asked. Those who must not share
# get a salt each.
#
# ## The code
#
# The key, and what a hit must satisfy. A hash alone is never trusted: the block's tokens are compared, and its parent
# by identity, which stands for the whole prefix:

# %%
show_source(chain_hash, _is, HashIndex.find)

# %% [markdown]
# At admission a request walks along the chain. `_usable` leaves out the last token: its logits choose the first new
# token, and the cache holds no logits.

# %%
show_source(PrefixPagedCache._match, PrefixPagedCache._usable)

# %% [markdown]
# A released block that the index knows stays where it is. Empty blocks are taken first, then the one released longest
# ago:

# %%
show_source(BlockPool.release, BlockPool._evict)

# %% [markdown]
# Ends of tables are released before beginnings, and whoever holds a block holds the one before it. So the block
# released longest ago never has a child that can be found, and evicting needs no search. Scheduler and attention are
# m5's and m4's, and never learn who else holds a block. `make stage6 diff` shows the two files that were rewritten.
#
# ## Measured against m5
#
# The same chat:

# %%
m6 = measure("m6", chat())
columns = {
    "first_token": lambda r: seconds(r.ttft_s["p50"]),
    "in_the_last_turn": lambda r: seconds(r.ttft_by_group[f"turn {TURNS}"]["p50"]),
    "each_further_token": lambda r: seconds(r.itl_s["p50"]),
    "prompt_tokens_cached": lambda r: count(r.tokens_saved),
    "hit_rate": lambda r: "–" if r.prefix_hit_rate is None else f"{r.prefix_hit_rate:.0%}",
}
compare([m5, m6], **columns)

# %% [markdown]
# That is one user. Sharing is memory too: six requests at once, behind one system prompt.

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
m5 holds {held["m5"] // block_bytes} blocks, m6 **{held["m6"] // block_bytes}**: the {len(system_ids) // 16} blocks of
the system prompt exist once. That holds although all six start in the same step: a step stores the keys and values of
all its tokens before it reads any, so a block can be found as soon as the step is *planned*.
""")

# %% [markdown]
# ## The picture
#
# Left: the chat. Right: the same chat, but of each prompt only a share is what was said before, and the rest is new.

# %%
shares = (0.0, 0.5, 0.8)
partly = [measure("m6", chat(share)) for share in shares]
points = sorted((r.prefix_hit_rate or 0.0, 1e3 * r.ttft_s["p50"]) for r in (*partly, m6))
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
turns = range(1, TURNS + 1)
for record in (m5, m6):
    times = [1e3 * record.ttft_by_group[f"turn {turn}"]["p50"] for turn in turns]
    left.plot(turns, times, marker="o", linewidth=3, color=color(record.stage))
    left.annotate(
        title(record.stage), (TURNS, times[-1]), xytext=(-4, 9), textcoords="offset points", color=color(record.stage),
        fontweight="bold", ha="right",
    )  # fmt: skip
left.set(ylim=(0, None), xlabel="turn of the chat", xticks=list(turns))
left.set_title("time to the first token, ms", loc="left")
right.plot(
    *zip(*[(100 * rate, time) for rate, time in points], strict=True), marker="o", linewidth=3, color=color("m6")
)
right.axhline(1e3 * m5.ttft_s["p50"], color=color("m5"), linestyle="--", linewidth=2)
right.annotate("m5", (1, 1e3 * m5.ttft_s["p50"]), xycoords=("axes fraction", "data"), xytext=(5, 0), va="center",
               textcoords="offset points", color=color("m5"), fontweight="bold")  # fmt: skip
right.set(ylim=(0, None), xlim=(-3, 100), xlabel="share of the prompt in the cache, %")
right.set_title("time to the first token, ms (median of the turns)", loc="left")
for axis in (left, right):
    axis.grid(axis="y", color="#E4E4E4")
figure.tight_layout(w_pad=4)
plt.show()

# %% [markdown]
# And this is what is in the cache after some chats on two tasks with one system prompt. A chain of hashes is a tree,
# though nobody stored one. `prefix_index="radix"` does store it, and can then find matches that end *inside* a block.

# %%
nodes, hit_rate = record_prefixes("m6", **HERE)
prefix_tree_figure(nodes, hit_rate)
plt.show()

# %% [markdown]
# ## Where it loses

# %%
nothing = partly[0]
TEXT = (
    "You are the assistant of a small library. Be polite, be brief, and recommend nothing that is not on the shelf. "
    * 4
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
- **Nothing in common, nothing won.** With no shared beginning the first token takes {seconds(nothing.ttft_s["p50"])},
  and in m5 {seconds(m5.ttft_s["p50"])}. Planning, hashes included, took m6 {seconds(nothing.plan_time_s)} for all
  {TURNS} turns, m5 {seconds(m5.plan_time_s)}.
- **Only equal *beginnings* count.** The second question behind the same system prompt finds {again[0]} of {again[1]}
  tokens. With the time of day in front of it: **{dated[0]}** of {dated[1]}.
- **Memory decides what is kept.** In a pool of 24 blocks, after four prompts of strangers ({evictions} evictions), the
  same question finds **{evicted[0]}**. Least recently used is not the same as least useful.
- **Decoding gets no faster:** {seconds(m6.itl_s["p50"])} for a token, against {seconds(m5.itl_s["p50"])}.
- **A match ends at a block's end.** Of {again[1]} tokens a few more were equal than the {again[0]} that were found.
  Larger blocks find less; `radix` copies the part of a block.
""")

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: what can be reused?
#
# m6 has served the prompts `earlier` (lists of token ids), one after the other. How many tokens of `prompt` come from
# the cache?


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
# Three rules: only full blocks; a block counts only behind all the same ones before it; and the last token is computed
# in any case, so that there are logits.
#
# ```python
# def reusable(prompt, earlier, block_size):
#     known = set()
#     for one in earlier:
#         for end in range(block_size, len(one) + 1, block_size):
#             known.add(tuple(one[:end]))  # the whole prefix: what a chain of hashes stands for
#     end = 0
#     while end + block_size < len(prompt) and tuple(prompt[: end + block_size]) in known:
#         end += block_size
#     return end
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: how many blocks?
#
# `requests` prompts arrive together. Each begins with the same `shared` tokens, and has `own` tokens of its own behind
# them. How many blocks do they hold together?


# %% tags=["exercise"]
def blocks_held(requests, shared, own, block_size):
    return requests * -(-(shared + own) // block_size)  # -(-a // b) is a / b, rounded up


check.blocks_held(blocks_held)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Full shared blocks exist once. A block in which the shared part ends belongs to each request alone: the tokens behind
# that point differ.
#
# ```python
# def blocks_held(requests, shared, own, block_size):
#     once = shared // block_size
#     each = -(-(shared + own) // block_size)
#     return once + requests * (each - once)
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: who is evicted?
#
# Requests come one after the other, each with a beginning of one block, named by a letter. The cache has room for
# `room` beginnings; when it is full, one has to go. Say for each request whether its beginning is found.


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
# First in, first out forgets what is needed all the time. Least recently *used*: a hit makes it the newest again.
#
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
#
# </details>

# %% [markdown]
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q9: how does prefix caching work?** Full blocks are known by a chain of hashes. A new request shares the blocks of
  its longest known beginning, and computes the rest. In the chat above {m6.prefix_hit_rate:.0%} of all prompt tokens
  came from the cache, and the first token after {seconds(m6.ttft_s["p50"])} instead of {seconds(m5.ttft_s["p50"])}:
  **{m5.ttft_s["p50"] / m6.ttft_s["p50"]:.1f} times sooner**.
- **Q9, a correction: `hash(token_ids[:prefix_len])`?** That hashes the whole prefix again for every block. A chain
  takes the parent's key, and costs one block each. And a hit is compared, so that a collision never gives a wrong
  answer.
- **Q9, a correction: copy-on-write?** A full block is never written again, so that sharing it needs no copy. Copies are
  for samples of one prompt that part (m3), and for matches that end inside a block (`radix`).
- **Q9, follow-up: what does it do for memory?** Six requests behind one system prompt of {len(system_ids)} tokens hold
  {held["m6"] // block_bytes} blocks instead of {held["m5"] // block_bytes}.
- **Follow-up 3: how is a prefix matched efficiently?** One lookup in a dictionary for each block, until the first that
  is not there. It is the same tree that a trie stores; the dictionary only leaves out the pointers.
- **Q3, "COW and matching are what is difficult":** harder is what nobody sees: the last token must be computed,
  duplicates of one step must not be freed under somebody, and eviction must never leave a child without its parent.
""")
