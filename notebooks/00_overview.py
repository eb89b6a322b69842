# %% [markdown]
# # 00: overview
#
# Eight engines for language models; each adds one idea to the previous one. This notebook runs all of them on this machine
# and shows the loop that they share. The other notebooks take the stages one by one; `99_compare` puts them side by side.
#
# You need: PyTorch, and what a transformer is. About 15 minutes.

# %% tags=["setup"]
from itertools import pairwise

import stages
from benchmarks.recipes import first, uniform
from benchmarks.table import rate, seconds
from benchmarks.workloads import Size, find
from common import Engine, SamplingParams
from notebooks.checks import overview as check
from notebooks.kit import HERE, change, compare, draw_bars, measure, say, show_source, table

import torch

# %% [markdown]
# ## The problem
#
# A model that is *served* has many users at once. Each of them feels three durations: until the first token (TTFT), between
# tokens (ITL), and until the end. The operator cares about a fourth figure: tokens per second of the machine. Here are eight
# users on the simplest correct engine, m0, at most four at a time:

# %%
users = Size(first(find("mixed").sizes["cpu"].recipe, 8, 24), max_num_seqs=4, max_model_len=256)
ladder = {"m0": measure("m0", users)}
m0 = ladder["m0"]
say(f"""
With {torch.get_num_threads()} of the machine's threads, in {HERE["dtype"]}: **{rate(m0.output_tokens_per_s)} tokens a second for all of them
together**. The first token comes after {seconds(m0.ttft_s["p50"])} (median) and {seconds(m0.ttft_s["max"])} at worst, each
further one after {seconds(m0.itl_s["p50"])}; {m0.padding_share:.0%} of the computed positions were wasted.
""")

# %% [markdown]
# ## The idea
#
# One idea carries the whole repository: **the model never changes.** A stage changes only *who runs when* (scheduler), *where
# keys and values live* (KV cache), *how attention reads them*, or *what the weights are made of*. The engine around them is a
# loop of three lines. Here is a small one, with a "model" that counts:


# %%
def model(batch):
    return {name: tokens[-1] + 1 for name, tokens in batch.items()}


waiting, running, rows = [("A", [10], 3), ("B", [20], 1), ("C", [30], 2)], {}, 2
log = []
while waiting or running:
    while waiting and len(running) < rows:  # plan: who runs in this step?
        name, tokens, wanted = waiting.pop(0)
        running[name] = (tokens, len(tokens) + wanted)
    sampled = model({name: tokens for name, (tokens, _) in running.items()})  # execute
    log.append(sampled)
    for name, token in sampled.items():  # update: take the tokens; finished requests leave
        running[name][0].append(token)
    running = {name: (tokens, end) for name, (tokens, end) in running.items() if len(tokens) < end}
say(f"{len(log)} steps: {log}")

# %% [markdown]
# ## The code
#
# The real loop, the same for all eight stages. On a GPU it also plans the next step while one is running:

# %%
show_source(Engine.step, Engine._step, Engine._start, Engine._finish)

# %% [markdown]
# Every stage is built and used in the same way. `engine.py` of a stage is a list of its parts, and its imports say where each
# part comes from:

# %%
with stages.build("m6", max_model_len=256, max_num_seqs=2, **HERE) as engine:
    [output] = engine.generate(["The capital of France is"], SamplingParams(max_tokens=12))
    parts = [engine.scheduler, engine.scheduler.cache, engine.runner.attention, engine.runner.model]
say(f"m6 writes: *{output.prompt}* **{output.text.strip()}**")
table(["part of m6", "from"], [[f"`{type(part).__name__}`", f"`{type(part).__module__}`"] for part in parts])

# %% [markdown]
# ## Measured
#
# The same eight users on all stages: a small workload, one run each. `make bench` measures properly; each stage's own
# notebook shows the workload that its idea is for.

# %%
for stage in map(stages.short_name, stages.names()):
    if stage not in ladder:
        ladder[stage] = measure(stage, users)
shown = ("output tokens/s", "first token", "each further token", "KV slots filled", "wasted positions")
compare(list(ladder.values()), *shown)

# %% [markdown]
# ## The picture

# %%
panel = {"output tokens a second, eight short requests": (lambda r: r.output_tokens_per_s, rate)}
draw_bars(list(ladder.values()), panel)
speeds = {stage: r.output_tokens_per_s for stage, r in ladder.items()}
best = max(speeds, key=speeds.get)
say(f"From m0 to {best}: **{speeds[best] / speeds['m0']:.0f} times**, on the same model and the same machine.")

# %% [markdown]
# ## Where it loses
#
# Each idea has a workload on which it gains, and others on which it costs. One request alone, for example, shares no step,
# competes for no memory, and has no prefix in common with another:

# %%
alone = Size(uniform(1, (32, 32), (32, 32)), max_num_seqs=1, max_model_len=128)
single = {stage: measure(stage, alone).output_tokens_per_s for stage in ("m1", "m2", "m3", "m4", "m5", "m6")}
pairs = [(stage, single[stage], single[before]) for before, stage in pairwise(single)]
flat = ", ".join(f"{stage} ({change(speed, old)})" for stage, speed, old in pairs if speed < 1.1 * old)
say(f"""
One request alone: {", ".join(f"{stage} {rate(speed)}" for stage, speed in single.items())} tokens a second. Less than 10 % faster
than the stage before: **{flat or "none"}**. Each stage's notebook and README say where it loses.
""")

# %% [markdown]
# ## Exercises
#
# Run a cell, read what the check says, change the cell, run it again.
#
# ### Exercise 1: what a user feels
#
# A request arrived at `arrival` and got tokens at `token_times` (seconds). Return TTFT, the mean time between tokens, and the
# time to the end. The start below has one of the three right.


# %% tags=["exercise"]
def latencies(arrival, token_times):
    ttft = token_times[0]
    between = (token_times[-1] - arrival) / len(token_times)
    end = token_times[-1] - arrival
    return ttft, between, end


check.latencies(latencies)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The first token waits for the prompt, the others for one step each: two figures.
# ```python
# def latencies(arrival, token_times):
#     ttft = token_times[0] - arrival
#     between = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
#     end = token_times[-1] - arrival
#     return ttft, between, end
# ```
# </details>
#
# ### Exercise 2: the limit
#
# To decode one token for each of `requests` requests, a step has to read all weights from memory. If nothing else took time,
# how many output tokens a second would there be?


# %% tags=["exercise"]
def bandwidth_limit(weights_bytes, bytes_per_second, requests):
    return bytes_per_second / (weights_bytes * requests)


check.bandwidth_limit(bandwidth_limit)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bandwidth_limit(weights_bytes, bytes_per_second, requests):
#     return requests * bytes_per_second / weights_bytes
# ```
# </details>
#
# ### Exercise 3: which idea cures which pain?
#
# Fill in `"m1"` … `"m7"`. The names of the stages above are a hint.

# %% tags=["exercise"]
cures = {
    "every token costs more than the one before": "m1",
    "short requests wait for a long one of their batch": "m5",
    "memory is full of reserved, empty slots": "",
    "attention writes a score matrix of length²": "",
    "a long prompt stalls all decodes": "",
    "the same system prompt is computed for every request": "",
    "reading the weights takes all the time": "",
}
check.cures(cures)

# %% [markdown]
# <details><summary>Solution</summary>
#
# In the order of the symptoms:
# ```python
# cures = dict(zip(cures, ("m1", "m2", "m3", "m4", "m5", "m6", "m7")))
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q1: what is the project?** Eight engines that share one model and one loop; each changes one thing. From m0 to {best} it is
  {speeds[best] / speeds["m0"]:.0f} times the throughput on the small workload above.
- **Q11: how would you design an inference system?** The four parts in the table above, and the loop *plan, execute, update*.
- **Q14: how do you analyse performance?** By what users feel (first token {seconds(m0.ttft_s["p50"])} on m0,
  {seconds(ladder[best].ttft_s["p50"])} on {best}) and what the machine does (wasted positions, filled memory); then a profile:
  `make stage4 profile`.
""")
