# %% [markdown]
# # m2: continuous batching
#
# m1 decides who runs once for a whole batch. m2 decides it anew in every step: a request joins as soon as there is room, and
# leaves the moment it ends.
#
# You need: `m1_kv_cache`. About 20 minutes.

# %% tags=["setup"]
import stages  # first: it bounds how long idle threads spin, before PyTorch is loaded

# isort: split
from collections import deque
from itertools import accumulate, pairwise

import matplotlib.pyplot as plt
import torch

from benchmarks.recipes import first, uniform
from benchmarks.style import color, title
from benchmarks.table import rate, seconds
from benchmarks.workloads import Size, find
from common import SamplingParams
from common.scheduler import Scheduler
from common.watch.trace import StepTrace
from notebooks.checks import m2 as check
from notebooks.kit import HERE, compare, measure, say, show_source, table
from stages.m2_continuous_batching.attention import SlotAttention
from stages.m2_continuous_batching.batch import ragged_batch
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m2_continuous_batching.scheduler import ContinuousScheduler

# %% [markdown]
# ## The problem
#
# Twenty requests at once, eight rows. Most want a short answer, a few a long one, as users do. (They are the first of the
# benchmark's `mixed`, their outputs cut.) On m1:

# %%
requests = Size(first(find("mixed").sizes["cpu"].recipe, 20, 96), max_num_seqs=8, max_model_len=256)
m1 = measure("m1", requests)
say(f"""
{rate(m1.output_tokens_per_s)} output tokens a second. The median request waits **{seconds(m1.ttft_s["p50"])} for its first
token**, and **{m1.padding_share:.0%} of all positions were computed for nobody**: padding, and rows of requests that had
ended long before the longest of their batch.
""")

# %% [markdown]
# ## The idea
#
# Forget tensors for a moment. A request is the number of tokens that it still wants; a step gives one to everybody who runs.
# Here are both policies, on the same requests:

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


table(
    ["policy", "steps", "rows computed", "of them for nobody"],
    [
        [name, len(steps), sum(map(len, steps)), f"{1 - sum(wants) / sum(map(len, steps)):.0%}"]
        for name, steps in (("static", static(wants, 8)), ("continuous", continuous(wants, 8)))
    ],
)

# %% [markdown]
# That is the whole idea; it was new in 2022 (Orca), since tensors stand in its way: those who join bring a whole prompt,
# those who run bring one token. The way out is to give up the rectangle. A linear layer treats every token alike, so all
# tokens can lie end to end; only attention has to know where a sequence begins:

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
# The policy. Newcomers first; if there are none, or no room, one token for everyone:

# %%
show_source(ContinuousScheduler.plan, ContinuousScheduler._prefill)

# %% [markdown]
# Who has ended leaves in `update`, which all stages share, and gives back its slot at once:

# %%
show_source(Scheduler.update, SlotCache.free)

# %% [markdown]
# The step's tensors, without padding, and the one place that still looks at sequences one by one:

# %%
show_source(ragged_batch, SlotAttention.attend)

# %% [markdown]
# ## Measured against m1

# %%
m2 = measure("m2", requests)
compare(
    [m1, m2],
    output_tokens_per_s=lambda r: rate(r.output_tokens_per_s),
    first_token_median=lambda r: seconds(r.ttft_s["p50"]),
    end_mean=lambda r: seconds(r.e2e_s["mean"]),
    end_p99=lambda r: seconds(r.e2e_s["p99"]),
    positions_for_nobody=lambda r: f"{r.padding_share:.0%}",
)
gain = m2.output_tokens_per_s / m1.output_tokens_per_s

# %%
say(f"""
**{gain:.1f} times** the throughput. One reads of 3 to 5 times. The most that can be won is what was wasted: m1 computed
{m1.padding_share:.0%} for nobody, which allows {1 / (1 - m1.padding_share):.1f} times if all positions cost the same.
""")

# %% [markdown]
# ## The picture
#
# Ten small requests in four rows, as the engines' own traces have recorded them.


# %%
KINDS = {"prefill": "#0F6FC6", "decode": "#8CC5F0", "idle": "#FFFFFF"}


def record(stage):
    with stages.build(stage, max_num_seqs=4, max_model_len=64, **HERE) as engine:
        engine.trace = StepTrace()
        outputs = (3, 4, 22, 5, 6, 3, 14, 4, 5, 3)
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in outputs]
        engine.generate([list(range(100, 108))] * len(outputs), params)
        return engine.trace


figure, axes = plt.subplots(2, 1, figsize=(13, 7.5), sharex=True)
traces = {stage: record(stage) for stage in ("m1", "m2")}
for axis, (stage, trace) in zip(axes, traces.items(), strict=True):
    names = list(trace.arrivals)
    for step in trace.steps:
        for chunk in step.chunks:
            idle = chunk.kind == "idle"
            axis.barh(names.index(chunk.request_id), 1, left=step.index, height=0.84, linewidth=0.4, edgecolor="#B0B0B0" if idle
                      else "white", facecolor=KINDS[chunk.kind], hatch="////" if idle else None)  # fmt: skip
    axis.invert_yaxis()
    axis.set(yticks=range(len(names)), yticklabels=range(len(names)), ylabel="request")
    axis.set_title(f"{title(stage)}: {len(trace.steps)} steps", loc="left", color=color(stage), fontweight="bold")
axes[1].set_xlabel(
    "step        dark: prompt, light: one token, hatched: it has ended and is computed for nobody", loc="left"
)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Where it loses
#
# Eight requests of one length start and end together: nobody joins, nobody leaves, nothing is padded. Whatever differs then
# is not the scheduling, but what attention pays for slots that come and go. And m2 reserves memory as m1 does: a slot of `max_model_len` tokens
# for each request. With the memory of two slots, two requests run, however short they are:

# %%
even = Size(uniform(8, (32, 32), (32, 32)), max_num_seqs=8, max_model_len=128)
even1, even2 = measure("m1", even), measure("m2", even)
tight = Size(first(find("mixed").sizes["cpu"].recipe, 12, 24), max_num_seqs=8, max_model_len=512, kv_tokens=2 * 512)
roomy = Size(tight.recipe, max_num_seqs=8, max_model_len=512)
two, eight = measure("m2", tight), measure("m2", roomy)
say(f"""
- Eight equal requests: m1 {rate(even1.output_tokens_per_s)}, m2 {rate(even2.output_tokens_per_s)} output tokens a second.
- In the memory of two slots of 512 tokens m2 runs **{two.peak_running} requests at once** and makes
  {rate(two.output_tokens_per_s)} tokens a second; with room for eight, {rate(eight.output_tokens_per_s)}. Yet of those two
  slots only **{two.kv_utilization:.0%}** were filled. That is what m3 is for.
- A long prompt is a step of its own, during which nobody else gets a token. That is what m5 is for.
""")

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: how many steps?
#
# Requests that want `outputs` tokens arrive at once; m2 has `slots` for them. A prefill step gives each newcomer its first
# token. How many *decode* steps follow in all? Below is what a static batch would take.


# %% tags=["exercise"]
def steps(outputs, slots):
    batches = [outputs[i : i + slots] for i in range(0, len(outputs), slots)]
    return sum(max(batch) - 1 for batch in batches)


check.steps(steps)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Let in who waits while there is room; each decode step takes one from what everybody still wants. Who wants one token only
# is done with the prefill step, and his slot is free for the next one before anybody decodes.
#
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
#
# </details>

# %% [markdown]
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
#
# ```python
# def ragged_batch(starts, lengths):
#     query_start_loc = [0, *accumulate(lengths)]
#     positions = [start + i for start, length in zip(starts, lengths) for i in range(length)]
#     return query_start_loc, positions
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: who joins?
#
# `prompts` are the lengths of those who wait, in order of arrival. `slots` are free, and a prefill step should compute no
# more than `budget` tokens. How many start in this step? The start below can leave a request waiting for ever.


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
# A prompt that is longer than the whole budget goes alone: otherwise it would never go, and nobody behind it.
#
# ```python
# def admit(prompts, slots, budget):
#     started = 0
#     while started < min(slots, len(prompts)) and (started == 0 or prompts[started] <= budget):
#         budget -= prompts[started]
#         started += 1
#     return started
# ```
#
# </details>

# %% [markdown]
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q7: how does continuous batching work?** `plan` is asked before every step: newcomers while there is room, else one token
  for everyone. Above: {len(traces["m1"].steps)} steps with static batches, {len(traces["m2"].steps)} with continuous ones.
- **Q7, what does it win?** {gain:.1f} times the throughput here, and a first token after {seconds(m2.ttft_s["p50"])} instead of
  {seconds(m1.ttft_s["p50"])} (median). The factor is the share of the static batch that nobody needed, so it depends on how
  different the answers are in length: with equal ones it was {even2.output_tokens_per_s / even1.output_tokens_per_s:.2f}.
- **Q7, what is hard about it?** Sequences of different lengths in one batch (the ragged tensors above), cache slots whose
  owners come and go, and that nothing may be freed while a step that uses it is in flight.
- **Q3, the part on scheduling;** **Q14: low utilisation of the device** is what padding and idle rows look like from outside.
- **Follow-up 1: what is your scheduling algorithm?** First come, first served, prefill first, or by priority with ageing.
""")
