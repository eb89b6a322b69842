# %% [markdown]
# # m2: continuous batching
#
# m1 decides once for a whole batch who runs. m2 decides it in every step: a request joins as soon as there is room, and
# leaves when it ends.
#
# You need: `m1_kv_cache`. About 20 minutes.

# %% tags=["setup"]
from collections import deque
from itertools import accumulate, pairwise

from benchmarks.plots.timeline import timeline_figure
from benchmarks.recipes import first, uniform
from benchmarks.table import rate, seconds
from benchmarks.trace import record
from benchmarks.workloads import Size, find
from common.scheduler import Scheduler
from notebooks.checks import m2 as check
from notebooks.kit import HERE, change, compare, measure, say, show_picture, show_source, table
from stages.m2_continuous_batching.attention import SlotAttention
from stages.m2_continuous_batching.batch import ragged_batch
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m2_continuous_batching.scheduler import ContinuousScheduler

import torch

# %% [markdown]
# ## The problem
#
# Twenty requests at once, eight rows; most want a short answer, a few a long one (the first of the benchmark's `mixed`, with
# outputs cut). On m1:

# %%
requests = Size(first(find("mixed").sizes["cpu"].recipe, 20, 96), max_num_seqs=8, max_model_len=256)
m1 = measure("m1", requests)
say(f"""
{rate(m1.output_tokens_per_s)} output tokens a second. The median request waits **{seconds(m1.ttft_s["p50"])} for its first
token**, and **{m1.padding_share:.0%} of all positions were wasted**: padding, and rows of finished requests.
""")

# %% [markdown]
# ## The idea
#
# Without tensors, a request is the number of tokens that it still wants, and a step gives one to each that runs. Both
# policies, on the same requests:

# %%
wants = [r.max_tokens for r in requests.requests(vocab_size=100)]


def static(wants, rows):
    """Who is computed in each step: (request, is it still wanted?)."""
    steps, waiting = [], deque(enumerate(wants))
    while waiting:
        batch = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
        steps += [[(who, made < tokens) for who, tokens in batch] for made in range(max(tokens for _, tokens in batch))]
    return steps


def continuous(wants, rows):
    steps, waiting, running = [], deque(enumerate(wants)), {}
    while waiting or running:
        while waiting and len(running) < rows:  # join
            who, tokens = waiting.popleft()
            running[who] = tokens
        steps.append([(who, True) for who in running])
        running = {who: left - 1 for who, left in running.items() if left > 1}  # leave
    return steps


policies = {"static": static(wants, 8), "continuous": continuous(wants, 8)}
counted = {name: (len(steps), sum(map(len, steps))) for name, steps in policies.items()}
rows = [(name, steps, computed, f"{1 - sum(wants) / computed:.0%}") for name, (steps, computed) in counted.items()]
table(["policy", "steps", "rows computed", "of them wasted"], rows)

# %% [markdown]
# That is the whole idea (Orca, 2022). Tensors make it hard: a request that joins brings a whole prompt, one that runs brings
# one token. So give up the rectangle. A linear layer treats every token alike, so all tokens can be laid end to end; only
# attention has to know where a sequence begins:

# %%
lengths = [5, 2, 1]  # two prompts, and a request that decodes
ragged = torch.randn(sum(lengths), 64)
linear = torch.nn.Linear(64, 64)
starts = [0, *accumulate(lengths)]
together = linear(ragged)
apart = torch.cat([linear(ragged[a:b]) for a, b in pairwise(starts)])
say(f"""
`query_start_loc` = {starts}: {sum(lengths)} positions instead of the {len(lengths) * max(lengths)} of a rectangle, and the
same numbers (largest difference {(together - apart).abs().max().item():.1g}).
""")

# %% [markdown]
# ## The code
#
# The policy. New requests first; if there are none, or no room, one token for each running one:

# %%
show_source(ContinuousScheduler.plan, ContinuousScheduler._prefill)

# %% [markdown]
# A finished request leaves in `update`, which all stages share, and its slot is free at once:

# %%
show_source(Scheduler.update, SlotCache.free)

# %% [markdown]
# The step's tensors, without padding, and attention, which still looks at sequences one by one:

# %%
show_source(ragged_batch, SlotAttention.attend)

# %% [markdown]
# ## Measured against m1

# %%
m2 = measure("m2", requests)
shown = ("output tokens/s", "first token", "end, mean", "wasted positions")
compare([m1, m2], *shown, end_p99=lambda r: seconds(r.e2e_s["p99"]))
gain = m2.output_tokens_per_s / m1.output_tokens_per_s
say(f"""
**{gain:.1f} times** the throughput. The usual claim is 3–5x. The most that can be gained is what was wasted: m1's
{m1.padding_share:.0%} allow {1 / (1 - m1.padding_share):.1f} times if all positions cost the same.
""")

# %% [markdown]
# ## The picture
#
# Sixteen requests in the memory of two slots, recorded step by step: the scenario of `make stage2 trace`.

# %%
traces = {stage: record(stage, **HERE) for stage in ("m1", "m2")}
show_picture(lambda: timeline_figure(list(traces.values())))

# %% [markdown]
# ## Where it loses
#
# Eight requests of one length start and end together: none joins or leaves, nothing is padded, so the idea has nothing to
# gain. And m2 reserves memory as m1 does, a slot of `max_model_len` tokens for each request: with the memory of two slots, two
# requests run, however short they are:

# %%
even = Size(uniform(8, (32, 32), (32, 32)), max_num_seqs=8, max_model_len=128)
even1, even2 = measure("m1", even), measure("m2", even)
tight = Size(first(find("mixed").sizes["cpu"].recipe, 12, 24), max_num_seqs=8, max_model_len=512, kv_tokens=2 * 512)
roomy = Size(tight.recipe, max_num_seqs=8, max_model_len=512)
two, eight = measure("m2", tight), measure("m2", roomy)
say(f"""
- Eight equal requests: m1 {rate(even1.output_tokens_per_s)}, m2 {rate(even2.output_tokens_per_s)} output tokens a second
  ({change(even2.output_tokens_per_s, even1.output_tokens_per_s)}, one run each).
- In the memory of two slots of 512 tokens m2 runs **{two.peak_running} requests at once** and makes
  {rate(two.output_tokens_per_s)} tokens a second; with room for eight, {rate(eight.output_tokens_per_s)}. Yet of those two
  slots only **{two.kv_utilization:.0%}** were filled. That is what m3 is for.
- A long prompt is a step of its own, during which no other request gets a token. That is what m5 is for.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: how many steps?
#
# Requests that want `outputs` tokens arrive at once; m2 has `slots` for them. A prefill step gives each newcomer its first
# token. How many *decode* steps follow in all? Below is what a static batch takes.


# %% tags=["exercise"]
def steps(outputs, slots):
    batches = [outputs[i : i + slots] for i in range(0, len(outputs), slots)]
    return sum(max(batch) - 1 for batch in batches)


check.steps(steps)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Start waiting requests while there is room; each decode step takes one from what each still wants. A request for a single
# token is done with the prefill step, and its slot is free again before any decode.
# ```python
# def steps(outputs, slots):
#     waiting, running, count = list(outputs), [], 0
#     while waiting or running:
#         joined = waiting[: slots - len(running)]
#         waiting = waiting[len(joined) :]
#         running += [tokens - 1 for tokens in joined]
#         running = [left for left in running if left]
#         if not joined:
#             count += 1
#             running = [left - 1 for left in running if left > 1]
#     return count
# ```
# </details>
#
# ### Exercise 2: end to end
#
# Sequence i has `starts[i]` tokens in the cache and `lengths[i]` new ones. Give `query_start_loc` (where each sequence's new
# tokens begin, and the end) and the position of every new token in its sequence.


# %% tags=["exercise"]
def ragged_batch(starts, lengths):
    query_start_loc = [0, *accumulate(lengths)]
    positions = list(range(sum(lengths)))
    return query_start_loc, positions


check.ragged(ragged_batch)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Positions count within a sequence, from what it has in the cache.
# ```python
# def ragged_batch(starts, lengths):
#     query_start_loc = [0, *accumulate(lengths)]
#     positions = [start + i for start, length in zip(starts, lengths) for i in range(length)]
#     return query_start_loc, positions
# ```
# </details>
#
# ### Exercise 3: which requests join?
#
# `prompts` are the lengths of the waiting prompts, in order of arrival. `slots` are free, and a prefill step should compute
# no more than `budget` tokens. How many start in this step? The start below can leave a request waiting for ever.


# %% tags=["exercise"]
def admit(prompts, slots, budget):
    started = 0
    while started < min(slots, len(prompts)) and prompts[started] <= budget:
        budget -= prompts[started]
        started += 1
    return started


check.admit(admit)

# %% [markdown]
# <details><summary>Solution</summary>
#
# A prompt that is longer than the whole budget goes alone: otherwise it and all behind it would wait for ever.
# ```python
# def admit(prompts, slots, budget):
#     started = 0
#     while started < min(slots, len(prompts)) and (started == 0 or prompts[started] <= budget):
#         budget -= prompts[started]
#         started += 1
#     return started
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q7: how does continuous batching work?** `plan` is asked before every step: new requests while there is room, else one token
  for each running one. In the picture: {len(traces["m1"].trace.steps)} steps with static batches,
  {len(traces["m2"].trace.steps)} with continuous ones.
- **Q7, what does it gain?** {gain:.1f} times the throughput here, and a first token after {seconds(m2.ttft_s["p50"])} instead of
  {seconds(m1.ttft_s["p50"])} (median). The factor depends on how different the answers are in length: with equal ones it was
  {even2.output_tokens_per_s / even1.output_tokens_per_s:.2f}.
- **Q7, what is hard about it?** Sequences of different lengths in one batch (the ragged tensors above), cache slots whose
  owners change, and that nothing may be freed while a running step uses it.
""")
