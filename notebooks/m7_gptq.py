# %% [markdown]
# # m7: GPTQ
#
# m7 is m6 with 4 bits for a weight in its linear layers instead of 16. Scheduler, cache and attention are unchanged.
#
# You need: PyTorch, a little linear algebra, and `m1_kv_cache`. About 30 minutes.

# %% tags=["setup"]
import copy

import stages
from benchmarks import quality
from benchmarks.recipes import uniform
from benchmarks.style import SOFT
from benchmarks.table import rate, seconds
from benchmarks.table import size as written
from benchmarks.workloads import Size
from common.models import load_model, load_tokenizer
from common.models.load import open_source
from common.models.weights import loader
from notebooks.checks import m7 as check
from notebooks.kit import HERE, compare, draw_lines, each, measure, read_bandwidth, say, show_source, table
from stages.m7_gptq.checkpoint.baselines import rounding_reader
from stages.m7_gptq.checkpoint.texts import DATA, tokens
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.fast.kernels import cpu_codes
from stages.m7_gptq.gptq import gptq, inverse_factor
from stages.m7_gptq.linear import QuantizedLinear
from stages.m7_gptq.load import build_quantized_decoder
from stages.m7_gptq.settings import Settings

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# m7 needs the model in 4 bits. The first cell that builds m7 makes it, once and in some minutes; the line under the cell says
# how far it is.
#
# ## The problem
#
# What does a decode step wait for? m6, with one request and with sixteen, each 32 tokens in and 24 out:


# %%
def decode(stage, rows):
    return measure(stage, Size(uniform(rows, (32, 32), (24, 24)), max_num_seqs=rows, max_model_len=128))


ROWS = (1, 4, 16)
m6 = {rows: decode("m6", rows) for rows in ROWS}

# %% [markdown]
# A step multiplies every token's vector with every weight of the linear layers and of the head, so it has to read them all,
# for one token as for sixteen. How long does this machine take to read all these bytes?

# %%
model = load_model(HERE["model"], dtype=HERE["dtype"])
layers_bytes = quality.projection_bytes(model)
step_bytes = layers_bytes + model.head.weights_bytes()

bandwidth = read_bandwidth()
floor, one, many = step_bytes / bandwidth, m6[1].itl_s["p50"], m6[ROWS[-1]].itl_s["p50"]
say(f"""
m6's weights for one step are {written(step_bytes)}. Read at {bandwidth / 1e9:.0f} GB/s that takes {seconds(floor)}. A step
with one request takes **{seconds(one)}: {floor / one:.0%} of it is the time to read the weights.** With {ROWS[-1]} requests it is
{seconds(many)}: {ROWS[-1]} times the arithmetic in {many / one:.1f} times the time. Fewer bytes would make a step shorter.
""")

# %% [markdown]
# ## The idea
#
# Four bits are 16 values. Each output gets, for every 32 inputs, 16 evenly spaced values from the smallest of the 32 weights
# to the largest, with 0 among them. Stored are the number of the value, and for each group the distance (*scale*) and the
# number that means 0 (*zero point*).

# %%
GROUP = 32


def grid(weights):
    """weights [GROUP, out]: a function that rounds to the nearest of each output's 16 values."""
    low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return lambda w: (((w / scale).round() + zero).clamp(0, 15) - zero) * scale


# %% [markdown]
# That is *round to nearest*, RTN. It minimises each weight's error. Is that what we want? Two weights of 0.4, on a grid of
# whole numbers, and inputs that are correlated:

# %%
inputs, weights = torch.tensor([[1.0, 1.0], [2.0, 2.1]]), torch.tensor([0.4, 0.4])
choices = {
    "as they are": weights,
    "each to its nearest": weights.round(),
    "the second one up": torch.tensor([0.0, 1.0]),
}


def numbers(tensor):
    return ", ".join(f"{number:.2f}" for number in tensor)


table(
    ["", "weights", "mean square error of a weight", "outputs"],
    [[name, numbers(w), f"{(w - weights).square().mean():.2f}", numbers(inputs @ w)] for name, w in choices.items()],
)

# %% [markdown]
# The third row has larger errors in its weights, and far smaller ones in its outputs: the second weight compensates for the
# rounding of the first. **It is the outputs that must not change, not the weights.**
#
# Are the inputs of a real layer correlated like this? Record what arrives at the q, k and v projection of the model's second
# layer while it reads some text.

# %%
LAYER = 1
beginning = copy.copy(model)
beginning.layers = [copy.copy(layer) for layer in model.layers[: LAYER + 1]]


@torch.inference_mode()
def inputs_of(token_ids):
    """What arrives at the projection, [tokens, in]."""
    seen, projection = [], model.layers[LAYER].qkv_proj

    def listen(x):
        seen.append(x.float())
        return projection(x)

    beginning.layers[LAYER].qkv_proj = listen
    for part in token_ids.split(512):
        beginning(part, torch.arange(len(part)), quality.attend)
    return torch.cat(seen)


tokenizer = load_tokenizer(HERE["model"])
calibration = inputs_of(tokens(tokenizer, DATA / "calibration.txt")[:4096])
unseen = inputs_of(tokens(tokenizer, DATA / "evaluation.txt")[:1024])
hessian = 2 * calibration.T @ calibration / len(calibration)
energy = hessian.diagonal()
outlier = int(energy.argmax())
alike = hessian / (energy[:, None] * energy).sqrt()  # every input scaled to the same size
strength = torch.linalg.eigvalsh(alike).flip(0)
say(f"""
{len(calibration):,} tokens, {len(hessian)} inputs. Input {outlier} alone has {energy[outlier] / energy.sum():.0%} of the energy: an
*outlier*. With every input scaled to the same size, the 16 strongest of {len(hessian)} directions hold
**{strength[:16].sum() / strength.sum():.0%}**; of uncorrelated inputs they would hold {16 / len(hessian):.0%}.
""")

# %% [markdown]
# `hessian` is 2 XᵀX: the second derivative of the layer's squared output error. It is all that GPTQ uses of the text.
# The algorithm takes one input after the other (one *column* of `weight [out, in]`; a row here, because we transpose):
#
# 1. round its weights to the grid, for all outputs at once;
# 2. move the weights of all later inputs such that the outputs change least.
#
# The best move has a closed form (Optimal Brain Surgeon, 1993). It needs the inverse Hessian of the inputs that are still
# free, after each step; GPTQ's observation is that row i of **the Cholesky factor of the inverse** is just that. Without
# `pass_on` this is RTN:


# %%
def quantise(weight, hessian, pass_on):
    """The weight [out, in] on its grids, and the error of the outputs while more and more inputs are done."""
    columns, errors = weight.T.clone(), []
    damping = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian + damping), upper=True)
    for i in range(len(columns)):
        if i % GROUP == 0:
            errors.append((i, output_error(columns.T)))
            nearest = grid(columns[i : i + GROUP])  # of the weights as they are by now
        rounded = nearest(columns[i])
        if pass_on:
            error = (columns[i] - rounded) / factor[i, i]
            columns[i + 1 :] -= factor[i, i + 1 :, None] * error
        columns[i] = rounded
    return columns.T, [*errors, (len(columns), output_error(columns.T))]


def output_error(changed):
    """On text that was not calibrated on: squared error of the outputs, as a share of the outputs."""
    return float((unseen @ (changed - weight).T).square().sum() / (unseen @ weight.T).square().sum())


source = open_source(HERE["model"])
read = loader(source, torch.float32, torch.device("cpu"))
weight = read(f"model.layers.{LAYER}.self_attn.{name}_proj.weight" for name in "qkv")
rtn, rtn_errors = quantise(weight, hessian, pass_on=False)
ours, our_errors = quantise(weight, hessian, pass_on=True)
moved = {"round to nearest": rtn, "GPTQ": ours}
far = {name: (w - weight).square().sum() / weight.square().sum() for name, w in moved.items()}
rows = [(name, f"{far[name]:.2%}", f"{output_error(w):.3%}") for name, w in moved.items()]
table(["", "error of the weights", "error of the outputs, on other text"], rows)
say(f"""
Weights further from where they were, and **{output_error(rtn) / output_error(ours):.1f} times less error where it counts**.
""")

# %% [markdown]
# Expect other figures from a model in 16 bits: the embedded one comes from a file in 4 bits, whose grid has a real number as its
# *minimum* where GPTQ's format has a whole zero point. A round-to-nearest grid with a minimum would find those values again and
# prove nothing.
#
# ## The code
#
# The stage's algorithm adds three things: inputs that are always 0, act-order, and errors that are passed on to later blocks
# of 128 in one matrix product. The factor comes from a Cholesky factorisation of the Hessian, which also detects whether it
# can be inverted.

# %%
show_source(gptq, inverse_factor)

# %% [markdown]
# What multiplies by such weights? The definition is slow, because it dequantises the whole weight at every call. On a CPU runs
# a kernel that unpacks in registers and multiplies in bytes: the activations are rounded to 8 bits as well, in groups of 32.

# %%
show_source(QuantizedLinear.__call__, cpu_codes._quantize_row.py_func)

# %% [markdown]
# ## Measured against m6

# %%
m7 = {rows: decode("m7", rows) for rows in ROWS}
compare([m6[1], m7[1]], "output tokens/s", "first token", "each further token")
with stages.build("m7", max_model_len=quality.CONTEXT, max_num_seqs=1, **HERE) as engine:
    quantised = engine.runner.model
m7_layers_bytes = quality.projection_bytes(quantised)
m7_step_bytes = m7_layers_bytes + quantised.head.weights_bytes()
speedup, head_bytes = m7[1].output_tokens_per_s / m6[1].output_tokens_per_s, step_bytes - layers_bytes
say(f"""
One request: **{speedup:.1f} times** m6's tokens a second. The linear layers went from {written(layers_bytes)} to
{written(m7_layers_bytes)} (−{1 - m7_layers_bytes / layers_bytes:.0%}: 4 bits for the weight, and for each group a scale and a zero
point). The head was {written(head_bytes)} and is {written(quantised.head.weights_bytes())}, so a step reads
{written(m7_step_bytes)} instead of {written(step_bytes)} (−{1 - m7_step_bytes / step_bytes:.0%}).
""")

# %% [markdown]
# ## The picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
found = {"RTN": rtn_errors, "m7": our_errors}
errors = {name: ([i for i, _ in pairs], [100 * error for _, error in pairs]) for name, pairs in found.items()}
draw_lines(left, "error of the outputs in %", errors)
left.set(xlabel="inputs of the layer that are quantised", xticks=range(0, len(hessian) + 1, 96))
at = outlier // GROUP * GROUP
left.annotate(f"the group of input {outlier} ", (at + GROUP / 2, 100 * rtn_errors[-1][1] / 2), ha="right", color=SOFT)
steps = {r[1].stage: (ROWS, [1e3 * r[rows].itl_s["p50"] for rows in ROWS]) for r in (m6, m7)}
draw_lines(right, "time of a decode step in ms", steps)
right.set(xlabel="requests in the step", xticks=ROWS)
figure.tight_layout(w_pad=6)
plt.show()

# %% [markdown]
# ## Where it loses
#
# **Many tokens in a step.** Where a step computes longer than it reads, fewer bytes help less, and unpacking a weight is more
# work. Below 1, m7 is slower (one run each):

# %%
prompt = Size(uniform(1, (512, 512), (2, 2)), max_num_seqs=1, max_model_len=576)
prompts = [measure(stage, prompt).ttft_s["p50"] for stage in ("m6", "m7")]
by_rows = [m7[rows].output_tokens_per_s / m6[rows].output_tokens_per_s for rows in ROWS]
table(
    ["m7 against m6", *(f"decode, {rows} request{'s' * (rows > 1)}" for rows in ROWS), "a prompt of 512 tokens"],
    [
        ["m6", *(f"{rate(m6[rows].output_tokens_per_s)} tokens/s" for rows in ROWS), seconds(prompts[0])],
        ["m7", *(f"{rate(m7[rows].output_tokens_per_s)} tokens/s" for rows in ROWS), seconds(prompts[1])],
        ["times as fast", *(f"{times:.2f}" for times in by_rows), f"{prompts[0] / prompts[1]:.2f}"],
    ],
)

# %% [markdown]
# **Quality.** Perplexity on 1,024 tokens outside the calibration text. GPTQ here is the model that m7 runs, with a search for
# each group's grid.

# %%
page = tokens(tokenizer, DATA / "evaluation.txt")[: quality.CONTEXT]
rounding = rounding_reader(source, Settings(search=False))
fast = Int4Layers(model.dtype, model.device)
nearest = build_quantized_decoder(source, rounding, model.dtype, model.device, False, fast)
perplexity, likeliest = {}, {}
decoders = {HERE["dtype"]: model, "4 bits, round to nearest": nearest, "4 bits, GPTQ": quantised}
for name, decoder in each("perplexity of models", decoders.items()):
    perplexity[name], likeliest[name] = quality.measure(decoder, page)
plain = next(iter(perplexity))
lost = {name: p / perplexity[plain] - 1 for name, p in perplexity.items()}
same = {name: (chosen == likeliest[plain]).float().mean() for name, chosen in likeliest.items()}
table(
    ["weights", "perplexity", f"over {plain}", f"likeliest token is that of {plain}"],
    [(name, f"{p:.1f}", f"{lost[name]:+.1%}", f"{same[name]:.0%}") for name, p in perplexity.items()],
)
say(f"""
GPTQ costs {lost["4 bits, GPTQ"]:.0%} where rounding costs {lost["4 bits, round to nearest"]:.0%}, on a small text and a small model
that was rounded once before. `make stage7 quality` measures on thirty times as much text, with 8 bits, NF4, other groups and
act-order; its table is in the [README of m7](../stages/m7_gptq/README.md).
""")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: how many bytes?
#
# "4 bits instead of 16: −75 %." How many bytes does a matrix of `outputs` × `inputs` really take? For every group of
# `group_size` inputs, each output has a scale (16 bits) and a zero point (4 bits). The last group may be shorter.


# %% tags=["exercise"]
def bytes_in_4_bits(inputs, outputs, group_size):
    return inputs * outputs // 2


check.bytes_in_4_bits(bytes_in_4_bits)

# %% [markdown]
# <details><summary>Solution</summary>
#
# 20 bits more for each group and output; a shorter last group counts as one.
# ```python
# def bytes_in_4_bits(inputs, outputs, group_size):
#     groups = -(-inputs // group_size)
#     return inputs * outputs // 2 + groups * outputs * (16 + 4) // 8
# ```
# </details>
#
# ### Exercise 2: the formula of the textbooks
#
# This is how quantising is usually written down. Correct two things: codes and zero point must be whole numbers from 0 to 15,
# and every weight must come back as `(code - zero) * scale`, at most half a step away.


# %% tags=["exercise"]
def four_bits(weights):
    low, high = weights.min(), weights.max()
    scale = (high - low) / 15
    zero = -low / scale
    codes = (weights / scale + zero).round()
    return codes, scale, zero


check.four_bits(four_bits)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The zero point is a whole number, between 0 and 15 only if the range includes 0. Rounding it may push the last code to 16,
# so codes are clamped. (`fit_grid` in `grid.py` also handles a group of zeros, whose scale would be 0.)
# ```python
# def four_bits(weights):
#     low, high = weights.min().clamp(max=0), weights.max().clamp(min=0)
#     scale = (high - low) / 15
#     zero = (-low / scale).round()
#     codes = ((weights / scale).round() + zero).clamp(0, 15)
#     return codes, scale, zero
# ```
# </details>
#
# ### Exercise 3: compensate
#
# One step of GPTQ. `columns [in, out]` are the weights, those before input `i` are done, `rounded [out]` is what input i was
# rounded to, `factor` the upper Cholesky factor of the inverse Hessian. Return the columns with input i rounded and later
# inputs moved. The check solves the least-squares problem itself.


# %% tags=["exercise"]
def make_good(columns, i, rounded, factor):
    error = columns[i] - rounded
    columns[i + 1 :] -= factor[i, i + 1 :, None] * error
    columns[i] = rounded
    return columns


check.make_good(make_good)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Lines 7 and 8 of the paper: the error is in units of the diagonal.
# ```python
# def make_good(columns, i, rounded, factor):
#     error = (columns[i] - rounded) / factor[i, i]
#     columns[i + 1 :] -= factor[i, i + 1 :, None] * error
#     columns[i] = rounded
#     return columns
# ```
# </details>
#
# ## Interview questions
#
# Full answers are in the [interview guide](../reports/interview_guide.md). With what this notebook has measured:

# %%
say(f"""
- **Q10: how does GPTQ work?** It quantises input by input and moves the weights that are still free so that the layer's
  *outputs* change least; one Cholesky factorisation of the inverse Hessian replaces an update at every step. On one layer here:
  {output_error(rtn):.2%} error of the outputs with rounding, {output_error(ours):.2%} with GPTQ.
- **Q10, "75 % less memory":** {1 - m7_layers_bytes / layers_bytes:.0%} of the quantised layers here, as scales and zero points
  count too; a decode step reads {1 - m7_step_bytes / step_bytes:.0%} less, with its head.
- **Q10, "20 to 50 % faster":** with one request {speedup - 1:+.0%}, with {ROWS[-1]} requests {by_rows[-1] - 1:+.0%}, and a
  prompt of 512 tokens {prompts[0] / prompts[1] - 1:+.0%}. It helps where a step is memory-bound.
- **Q14: how do you find the bottleneck?** Divide the bytes of a step by the bandwidth ({seconds(floor)} here) and compare with the
  step ({seconds(one)}). If they are close, only fewer bytes or more rows help.
""")
