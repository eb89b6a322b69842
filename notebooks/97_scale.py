# %% [markdown]
# # 97: from one device to a cluster
#
# One engine drives one device. This notebook runs one model over two processes, puts engines behind a router, and asks a
# simulator what a cluster would do before anybody rents it.
#
# You need: [m5](m5_chunked_prefill.ipynb) and [m6](m6_prefix_caching.ipynb). About 25 minutes.

# %% tags=["setup"]
import json
import time

import matplotlib.pyplot as plt
import torch

import stages
from benchmarks.environment import ROOT
from benchmarks.simulator import answers
from benchmarks.simulator.answers import SHAPES, Model, ranks, routing
from benchmarks.simulator.cost import Device, PaperCost, Work
from benchmarks.simulator.replica import PricedRunner
from benchmarks.style import STAGE_COLORS
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from common import SamplingParams
from common.execution.parallel.decoder import RowLinear
from common.scale.prefixes import Prefixes
from notebooks.checks import scale as check
from notebooks.kit import HERE, each, say, show_source, table

H200 = Device(bytes_per_s=4.0e12, flop_per_s=700e12)  # about what a copy and a matrix product reach

# %% [markdown]
# ## The problem
#
# A device has so much memory, and reads it so fast. Both are limits of one engine. What do models of three sizes ask for?
# (On paper: bytes of the weights in bfloat16, and a step that reads them once.)

# %%
rows = []
for name, shape in SHAPES.items():
    cost = PaperCost(shape, H200)
    fits = "yes" if cost.weight_bytes < H200.memory_bytes else "no"
    rows.append((name, written(cost.weight_bytes), fits, seconds(cost(Work(decodes=1, context=2048)))))
table(["model", "weights", "fits into one device", "a decode step, one request"], rows)

# %% [markdown]
# ## The idea
#
# Two things can be divided: the **model**, so that each device holds and reads a part (*tensor parallelism*), or the
# **requests**, so that each engine serves some of them (*replicas*).
#
# A model divides well where a layer has two products in a row (Megatron-LM, 2019). The first one is cut by its outputs, the
# second by its inputs. What lies between them stays on its device, and one sum at the end puts the parts together:

# %%
x, up, down = torch.randn(3, 64), torch.randn(256, 64), torch.randn(64, 256)
whole = torch.relu(x @ up.T) @ down.T
halves = [torch.relu(x @ up[part].T) @ down[:, part].T for part in (slice(0, 128), slice(128, 256))]
say(f"The sum of both ranks' results and the whole differ by at most {float((sum(halves) - whole).abs().max()):.0e}.")

# %% [markdown]
# So a layer needs two sums over all ranks (*all-reduces*): behind attention, whose heads are divided, and behind the MLP.
#
# Replicas need no sums. They need a **router**: with prefix caching it matters which replica has seen the beginning of a
# prompt before.
#
# ## The code
#
# The product whose inputs are divided, and the router of the served replicas:

# %%
show_source(RowLinear, Prefixes.order)

# %% [markdown]
# To ask what 64 replicas would do, nobody needs 64 devices. Scheduler, cache and engine touch no tensor: they run as they are,
# in virtual time, with a runner that returns when a cost model says so. A step's cost comes from its plan: bytes read,
# operations, and bytes that ranks send each other.

# %%
show_source(PricedRunner.submit, PaperCost.__call__, PaperCost.collectives)

# %% [markdown]
# ## Measured
#
# ### Two ranks
#
# The same greedy answer from one process and from two, on this machine. Each rank is a process of its own; gloo sums.

# %%
prompt = ["The capital of France is"]
params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
found = {}
for number in each("engines", [1, 2]):
    with stages.build("m6", **HERE | {"dtype": "float32"}, tensor_parallel_size=number, max_model_len=128) as engine:
        engine.generate(prompt, params)  # the first call compiles
        began = time.perf_counter()
        [output] = engine.generate(prompt, params)
        took = time.perf_counter() - began
        found[number] = output.token_ids, took, engine.runner.model.weights_bytes()
same = "the same tokens" if found[1][0] == found[2][0] else "OTHER TOKENS"
table(
    ["ranks", "weights on rank 0", "tokens/s"],
    [(number, written(size), rate(len(ids) / took)) for number, (ids, took, size) in found.items()],
)
say(f"Both give **{same}**. Two ranks on one CPU are {found[2][1] / found[1][1]:.1f} times as slow: see below.")

# %% [markdown]
# ### Eight replicas, in virtual time
#
# A 32B model on each of eight H200s. Prompts begin with one of 64 texts of 4,096 tokens. Four routers get the same requests.

# %%
cost = PaperCost(SHAPES["32B"], H200)
model = Model("m6", cost.shape, cost, int(answers.FILLED * H200.memory_bytes - cost.weight_bytes))
routed = routing(model, count=8, rate=12.0, seconds=10.0)
table(
    ["router", "prompt tokens from caches", "median first token", "p99 first token"],
    [(r["policy"], f"{r['hit_rate']:.0%}", seconds(r["ttft_p50"]), seconds(r["ttft_p99"])) for r in routed],
)
own, steps = sum(r["took_s"] for r in routed), sum(r["steps"] for r in routed)
say(f"""
{steps:,} steps of real schedulers took {own:.0f} s here: {1e6 * own / steps:.0f} µs of bookkeeping each. Nothing else was
computed.
""")

# %% [markdown]
# ## The picture
#
# What more ranks do to one step, on paper: the layers' part shrinks with each rank, the sums' part does not.

# %%
paper = [row for row in ranks(H200) if row["what"].endswith("decode 1")]
figure, axis = plt.subplots(figsize=(11, 4.5))
for name, color in zip(SHAPES, (STAGE_COLORS[m] for m in ("m7", "m5", "m1")), strict=True):
    points = [row for row in paper if row["what"].startswith(name + ",")]
    axis.plot([p["ranks"] for p in points], [1e3 * p["seconds"] for p in points], marker="o", color=color, linewidth=3)
    axis.annotate(name, (points[0]["ranks"], 1e3 * points[0]["seconds"]), xytext=(6, 6), textcoords="offset points",
                  color=color, fontweight="bold")  # fmt: skip
axis.set(xscale="log", yscale="log", xlabel="ranks", xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"])
axis.set_title("One decode step, ms (on paper)", loc="left")
axis.minorticks_off()
plt.show()

# %% [markdown]
# ## Where it loses
#
# **Tensor parallelism** pays where a layer takes much longer than a sum. A decode step of a small model sums a few
# kilobytes, twice a layer, and each sum waits for the slowest rank. On one CPU a sum also wakes a sleeping process.
#
# **A prefix-aware router** sends what belongs together to one place, which can be too much for it: so it looks at loads, too.
#
# **A simulator** is as good as its prices. Ours were fitted on some workloads and tested on others (kept results of a CPU):

# %%
kept = json.loads((ROOT / "reports/cpu/cost_model.json").read_text())["rows"]
table(
    ["workload", "figure", "measured", "predicted", "error", "within"],
    [
        (r["workload"], r["figure"], f"{r['measured']:.3g}", f"{r['predicted']:.3g}", f"{r['error']:+.0%}",
         "yes" if r["met"] else f"no ({r['allowed']:.0%})")
        for r in kept
    ],
)  # fmt: skip
say(f"""
{sum(r["met"] for r in kept)} of {len(kept)} predictions are as close as was asked. Of the others it says that they are not: do not size a
cluster by them.
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: one rank's part
#
# An MLP, `relu(x @ up.T) @ down.T`, over `ranks` ranks: up [inner, hidden], down [hidden, inner]. Return what rank `rank`
# computes, so that the sum over all ranks is the whole. The answer below is right for rank 0 only.


# %% tags=["exercise"]
def mlp_part(x, up, down, rank, ranks):
    inner = len(up)
    mine = slice(rank * inner // ranks, (rank + 1) * inner // ranks)
    return torch.relu(x @ up[mine].T) @ down[:, : inner // ranks].T


check.mlp_part(mlp_part)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The second product is divided by its inputs: they are the first one's outputs, which this rank has.
# ```python
# def mlp_part(x, up, down, rank, ranks):
#     inner = len(up)
#     mine = slice(rank * inner // ranks, (rank + 1) * inner // ranks)
#     return torch.relu(x @ up[mine].T) @ down[:, mine].T
# ```
# </details>
#
# ### Exercise 2: bytes on the wire
#
# How many bytes does each rank send in a step, in all its all-reduces? There are two a layer, over `tokens` rows of `hidden`
# numbers of two bytes. In a ring each rank sends every number twice, but for its own part of 1 / ranks.


# %% tags=["exercise"]
def bytes_sent(tokens, hidden, layers, ranks):
    return 2 * layers * tokens * hidden


check.bytes_sent(bytes_sent)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bytes_sent(tokens, hidden, layers, ranks):
#     one = tokens * hidden * 2
#     return 2 * layers * 2 * (ranks - 1) / ranks * one
# ```
# </details>
#
# ### Exercise 3: a router
#
# `cached[i]`: how many tokens of the prompt replica i has cached; `loads[i]`: its requests in flight. Return a replica: the
# one with most cached tokens among those whose load is at most 1.5 times the mean and 4 more; of equals the least loaded.


# %% tags=["exercise"]
def choose(cached, loads):
    return max(range(len(loads)), key=lambda i: cached[i])


check.choose(choose)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def choose(cached, loads):
#     limit = 1.5 * sum(loads) / len(loads) + 4
#     free = [i for i in range(len(loads)) if loads[i] <= limit]
#     return max(free, key=lambda i: (cached[i], -loads[i]))
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
best, worst = max(routed, key=lambda r: r["hit_rate"]), min(routed, key=lambda r: r["hit_rate"])
one, eight = (next(r for r in paper if r["what"].startswith("32B") and r["ranks"] == n) for n in (1, 8))
say(f"""
- **Q13: several devices?** Inside a layer: column-parallel, then row-parallel, one sum; two sums a layer. On paper a 32B decode
  takes {seconds(one["seconds"])} on one device and {seconds(eight["seconds"])} on eight, {eight["collectives"]:.0%} of it in sums.
- **Q11: how many replicas, and how are they fed?** Let real schedulers run in virtual time. Eight replicas find
  {best["hit_rate"]:.0%} of the prompt tokens in caches with the {best["policy"]} router and {worst["hit_rate"]:.0%} with
  {worst["policy"]}, and the median first token comes after {seconds(best["ttft_p50"])} instead of {seconds(worst["ttft_p50"])}.
- **Q8: which chunk size?** Ask for the objective first: `make stage6 simulate` draws goodput against chunk size and batch.
""")
