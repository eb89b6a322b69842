# %% [markdown]
# # Beyond the engine: dropping tokens, and guessing them
#
# Two ideas that no stage has, tried on the model of the stages. A cache that *drops* tokens (StreamingLLM, H2O) stays small
# however long the text gets. A draft that *guesses* tokens (speculative decoding) lets one step of the model yield several.
#
# You need: `m3_paged_kv` and, for the draft, `m7_gptq`. About 30 minutes.

# %% tags=["setup"]
from dataclasses import replace

import stages
from benchmarks.quality import projection_bytes
from benchmarks.style import SOFT, STAGE_COLORS
from benchmarks.table import size as written
from common.memory import kv_bytes_per_token
from common.models import load_model, load_tokenizer
from common.models.layers import RotaryEmbedding, rotate
from common.models.ops import Ops
from common.watch.progress import progress_bar
from notebooks.checks import long_context as check
from notebooks.kit import HERE, say, show_source, table
from stages.m7_gptq.checkpoint.texts import DATA, tokens

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The problem

# %%
model, tokenizer = load_model(HERE["model"], dtype=HERE["dtype"]), load_tokenizer(HERE["model"])
config, per_token = model.config, kv_bytes_per_token(model.config, model.dtype)
LIMIT, D, GROUP = config.max_position_embeddings, config.head_dim, config.num_heads // config.num_kv_heads
read = projection_bytes(model) + model.head.weights_bytes()  # in every decode step; of the embedding it needs one row
say(f"""
- **Memory.** K and V of a token are {written(per_token)}. Beyond {read // per_token:,} tokens a decode step reads more bytes of
  the cache of *one* request than of weights. The model was made for {LIMIT:,} positions.
- **Time.** A decode step reads {written(read)} of weights to compute one token. For five tokens it would read
  them once as well, but the next four are not known yet.
""")

# %% [markdown]
# ## The idea
#
# **Drop tokens.** With room for N tokens, which are kept? *Window*: the last N. *Sinks + window* (StreamingLLM,
# [arXiv:2309.17453](https://arxiv.org/abs/2309.17453)): the first 4 and the last N − 4. Softmax weights sum to 1, so a head that
# finds nothing of interest must put its weight somewhere; it learns to put it on the first tokens, which all later ones can see.
# They are *attention sinks*. *Heavy hitters* (H2O, [arXiv:2306.14048](https://arxiv.org/abs/2306.14048)): in each head the last
# N / 2, and of the others the N / 2 that have received most attention.
#
# **Guess tokens.** A cheap draft proposes k tokens from its distributions q. The model computes its own distributions p at all
# these places in *one* step. A token x is accepted with probability min(1, p(x) / q(x)). At the first rejection a token is drawn
# from the **residual**, max(0, p − q) normalised, and the later guesses are thrown away. If all are accepted, p yields one more
# (Leviathan et al., [arXiv:2211.17192](https://arxiv.org/abs/2211.17192); Chen et al.,
# [arXiv:2302.01318](https://arxiv.org/abs/2302.01318)). The result is distributed exactly as p:
#
# - x is proposed and accepted with probability q(x) · min(1, p(x) / q(x)) = min(p(x), q(x)).
# - A rejection has probability 1 − Σ min(p, q) = Σ max(0, p − q). The residual is divided by the same sum, so a rejection yields x
#   with probability max(0, p(x) − q(x)). And min(p, q) + max(0, p − q) = p.
#
# ## The code
#
# The model hands `attend` queries and keys that are rotated to their positions already:

# %%
show_source(Ops.attention, rotate)

# %% [markdown]
# StreamingLLM counts positions *inside the cache*, so it keeps K unrotated. We get K unrotated without a change to the model: all
# tokens are said to be at position 0, and a rotation by 0 changes nothing. And one pass over a text computes what decoding it
# token by token computes, since what a layer drops depends on that layer alone. A policy is a function inside `attend`:

# %%
rope = RotaryEmbedding(replace(config, max_position_embeddings=4 * LIMIT), torch.float32, model.device)


def turn(x, positions):
    """Rotate x [..., T, D] to its positions [T]."""
    cos, sin = rope.at(positions)
    return rotate(x, cos[:, 0], sin[:, 0])


@torch.inference_mode()
def next_tokens(decoder, texts, policy, start=0):
    """Of texts [B, T]: the probabilities of the token after each, [B, T - start, vocab], from the token `start` on.

    policy(q [R, G, T, D], k [R, T, D], v [R, T, D]) -> [R, G, T, D]; R: KV heads of all texts, G: query heads of each."""

    def attend(layer, q, k, v):
        heads = (x.float().unflatten(0, texts.shape).transpose(1, 2).flatten(0, 1) for x in (q * D**-0.5, k, v))
        q_heads, k_heads, v_heads = heads
        seen = policy(q_heads.unflatten(0, (-1, GROUP)), k_heads, v_heads).flatten(0, 1)
        return seen.unflatten(0, (-1, q.shape[1])).transpose(1, 2).flatten(0, 1).to(q.dtype)

    hidden = decoder(texts.flatten(), torch.zeros(texts.numel(), dtype=torch.long), attend).unflatten(0, texts.shape)
    return decoder.logits(hidden[:, start:].flatten(0, 1)).float().softmax(-1).unflatten(0, (len(texts), -1))


def masked(size=None, sinks=0, positions=None, in_cache=True, watch=lambda weights: None):
    """Dense, window and sinks differ by a mask. size: of the cache, in tokens; None: no limit. positions: in the text.
    in_cache: sinks are as far away as they are in the cache (within the window distances are the same in both)."""

    def policy(q, k, v):
        i = torch.arange(k.shape[1])
        at, age = i if positions is None else positions, i[:, None] - i
        kept = (age >= 0) & ((age < (size or len(i)) - sinks) | (i < sinks))
        scores = turn(q, at) @ turn(k, at).mT[:, None]
        if sinks and in_cache:
            scores[..., :sinks] = turn(q, i.clamp(max=size - 1)) @ turn(k[:, :sinks], i[:sinks]).mT[:, None]
        weights = scores.masked_fill_(~kept, -torch.inf).softmax(-1)
        watch(weights)
        return weights @ v[:, None]

    return policy


def heavy_hitters(size):
    """Token by token: store, attend, add up each key's weights, choose what the next token replaces. Positions: the text's."""

    def policy(q, k, v):
        rows, length = torch.arange(len(k)), k.shape[1]
        q, k = turn(q, torch.arange(length)), turn(k, torch.arange(length))
        (keys, values), output = torch.zeros(2, len(k), size, D), torch.empty_like(q)
        total, born = torch.zeros(len(k), size), torch.zeros(len(k), size, dtype=torch.long)
        slot = torch.zeros(len(k), dtype=torch.long)
        for t in range(length):
            keys[rows, slot], values[rows, slot], total[rows, slot], born[rows, slot] = k[:, t], v[:, t], 0.0, t
            held = min(t + 1, size)
            weights = (q[:, :, t] @ keys[:, :held].mT).softmax(-1)  # [R, G, held]
            output[:, :, t] = weights @ values[:, :held]
            total[:, :held] += weights.sum(1)  # query heads with the same keys share a total
            recent = born > t + 1 - size // 2  # with the next token these are size // 2
            slot = torch.full_like(slot, held) if held < size else total.masked_fill(recent, torch.inf).argmin(-1)
        return output

    return policy


# %% [markdown]
# ## Measured
#
# **Perplexity** of two texts, each decoded from its first token; only their second halves count, where every cache is full. Then
# once more as if 16,000 tokens had come and gone behind the sinks, which is further than the model was made for.

# %%
LENGTH, SIZES = 768, (64, 128, 256)
page = tokens(tokenizer, DATA / "evaluation.txt")
texts, of_first = page[: 2 * LENGTH].view(2, LENGTH), []


def perplexity(policy):
    probabilities = next_tokens(model, texts[:, :-1], policy, start=LENGTH // 2)
    return probabilities.gather(-1, texts[:, LENGTH // 2 + 1 :, None]).log().mean().neg().exp().item()


later = torch.tensor([i if i < 4 else i + 16_000 for i in range(LENGTH - 1)])
policies = {"window": masked, "sinks + window": lambda size: masked(size, 4), "heavy hitters": heavy_hitters}
with progress_bar("perplexity", 2 + len(policies) * len(SIZES)) as advance:
    dense = perplexity(masked(watch=lambda weights: of_first.append(weights[:, :, LENGTH // 2 :, 0].mean().item())))
    found = {name: [] for name in policies}
    for name, size in ((name, size) for name in policies for size in SIZES):
        advance(1, f"{name}, {size} tokens")
        found[name].append(perplexity(policies[name](size)))
    advance(1, "16,000 tokens later")
    far = {in_cache: perplexity(masked(SIZES[-1], 4, later, in_cache)) for in_cache in (True, False)}
table(["tokens kept", *map(str, SIZES)], [(name, *(f"{x:.1f}" for x in row)) for name, row in found.items()])
say(f"""
With all tokens kept: **{dense:.1f}**. 16,000 tokens later, sinks + window, {SIZES[-1]} kept: with positions in the text
**{far[False]:.1f}**; with positions in the cache **{far[True]:.1f}**, as before, since those never exceed its size.
""")

# %% [markdown]
# **Speculation.** The draft is m7: the same model in 4 bits. First, one token: of 64 places in the text that where draft and
# model differ most, 20,000 draws, and a χ² test. As a control a mistake that looks right: after a rejection, draw from p.

# %%
with stages.build("m7", **HERE, max_model_len=64) as engine:
    draft = engine.runner.model
starts = page[: 64 * 24].view(64, 24)


def speculate(p, q, residual, draws=20_000):
    """Tokens [draws], drafted from q [V], accepted or replaced."""
    drafted = q.multinomial(draws, replacement=True)
    accepted = torch.rand(draws, dtype=torch.float64) * q[drafted] < p[drafted]  # with probability min(1, p / q)
    return torch.where(accepted, drafted, residual.multinomial(draws, replacement=True))  # which normalises


def chi_squared(drawn, p):
    """χ², its degrees of freedom, and the probability of one as large if `drawn` is distributed as p."""
    expected, counts = p * len(drawn), torch.bincount(drawn, minlength=len(p)).double()
    often = expected >= 5  # the others are counted together
    expected, counts = (torch.cat((x[often], x[~often].sum()[None])) for x in (expected, counts))
    value, freedom = ((counts - expected) ** 2 / expected).sum(), torch.tensor(len(counts) - 1.0).double()
    return value.item(), int(freedom), torch.special.gammaincc(freedom / 2, value / 2).item()


torch.manual_seed(0)
ps, qs = (next_tokens(decoder, starts, masked(), 23)[:, 0].double() for decoder in (model, draft))
p, q = (x[torch.minimum(ps, qs).sum(-1).argmin()] for x in (ps, qs))
tests = {name: chi_squared(speculate(p, q, r), p) for name, r in (("max(0, p − q)", (p - q).clamp(min=0)), ("p", p))}
table(
    ["after a rejection, draw from", "χ²", "degrees of freedom", "probability", "distributed as p?"],
    [(w, f"{x:,.0f}", n, f"{c:.2g}", "nothing against it" if c > 1e-3 else "**no**") for w, (x, n, c) in tests.items()],
)

# %% [markdown]
# Then, tokens for each step of the model. If every guess is accepted with the same probability α = Σ min(p, q), it is
# 1 + α + … + αᵏ. Measured: from each of the 64 places on, the draft proposes four tokens, and the model checks them. The last
# column counts the weights that are read, which is what a single user's decode step waits for.

# %%
ids, drafted_from = starts, []
for _ in range(4):
    drafted_from.append(next_tokens(draft, ids, masked(), ids.shape[1] - 1)[:, 0].double())
    ids = torch.cat((ids, drafted_from[-1].multinomial(1)), dim=1)
p, q, x = next_tokens(model, ids, masked(), 23)[:, :4].double(), torch.stack(drafted_from, dim=1), ids[:, 24:, None]
accepted = (torch.rand(x.shape, dtype=torch.float64) * q.gather(-1, x) < p.gather(-1, x))[..., 0]
alpha, cost = torch.minimum(p, q).sum(-1).mean().item(), (projection_bytes(draft) + draft.head.weights_bytes()) / read
yields = dict(enumerate((1 + accepted.cumprod(1).double().mean(0).cumsum(0)).tolist(), 1))
table(
    ["guesses", f"tokens a step if α = {alpha:.2f}", "measured", f"gain if a guess costs {cost:.2f} steps"],
    [(k, f"{sum(alpha**i for i in range(k + 1)):.2f}", f"{y:.2f}", f"{y / (1 + k * cost):.2f}x") for k, y in yields.items()],
)  # fmt: skip

# %% [markdown]
# ## The picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
for name, color in zip(policies, ("m1", "m4", "m7"), strict=True):
    left.plot(SIZES, found[name], marker="o", linewidth=3, color=STAGE_COLORS[color], label=name)
left.axhline(dense, color=SOFT, linestyle="--", label="all tokens kept")
left.set(xlabel="tokens kept", xticks=SIZES, ylim=(0, None))
left.legend(frameon=False)
left.set_title("perplexity", loc="left")
right.bar(range(config.num_layers), [100 * share for share in of_first], color=STAGE_COLORS["m4"])
right.set(xlabel="layer")
right.set_title("attention that the first token receives, %", loc="left")
figure.tight_layout(w_pad=4)
plt.show()

# %% [markdown]
# ## Where it loses
#
# A needle: a password early in a text, and the same words at its end. Does the model continue them with the password?

# %%
secrets = torch.tensor([tokenizer.encode(f"\n\nThe password of the library is {n}") for n in (4071, 9356, 2680, 5813)])
hay, stop = page[: 4 * 400].view(4, 400), torch.tensor(tokenizer.encode(".\n\n")).expand(4, -1)
needles, right_answers = torch.cat((hay[:, :100], secrets, stop, hay[:, 100:], secrets), dim=1), {}
for name, policy in {"dense": masked(), **{name: make(128) for name, make in policies.items()}}.items():
    digits = next_tokens(model, needles[:, :-1], policy, start=needles.shape[1] - 5).argmax(-1)
    right_answers[name] = int((digits == needles[:, -4:]).all(-1).sum())
sinks, heavy = (found[name][SIZES.index(128)] for name in ("sinks + window", "heavy hitters"))
say(f"""
- **What is dropped is gone.** Passwords found, of {len(secrets)}: {", ".join(f"{n} {x}" for n, x in right_answers.items())}, with
  128 of {needles.shape[1]} tokens kept. Perplexity at that size is only {sinks / dense - 1:+.0%} with sinks and
  {heavy / dense - 1:+.0%} with heavy hitters: most tokens can be guessed from their neighbours.
- **H2O needs the weights** of every step. A flash kernel (m4) never has them in memory, so it needs a second pass. And each head
  keeps other tokens, so a block of m3, which holds all heads of its tokens, is rarely free.
- **Guessing pays while weights are what a step waits for.** In a large batch arithmetic is, and rejected guesses cost as much of
  it as good ones. Each guess here reads {cost:.0%} of the bytes of a step; trained drafts are smaller.
""")

# %% [markdown]
# ## Exercises
#
# Which blocks could m3 release? A request of `length` tokens keeps the first `sinks` and the last `window`. Its blocks hold `block_size` tokens each. How many of
# them does it still need?


# %% tags=["exercise"]
def blocks_needed(length, sinks, window, block_size):
    return -(-(sinks + window) // block_size)  # -(-a // b) is a / b, rounded up


check.blocks_needed(blocks_needed)

# %% [markdown]
# <details><summary>Solution</summary>
#
# A block is needed as long as one of its tokens is, and the window begins and ends inside blocks.
# ```python
# def blocks_needed(length, sinks, window, block_size):
#     kept = [*range(min(sinks, length)), *range(max(0, length - window), length)]
#     return len({token // block_size for token in kept})
# ```
# </details>
#
# ## Interview questions
#
# Q12 in full is in the [interview guide](../reports/interview_guide.md#q12-how-do-you-handle-long-contexts); what the stages do
# without dropping anything is in the READMEs of [m3](../stages/m3_paged_kv/README.md) and
# [m6](../stages/m6_prefix_caching/README.md). With what this notebook has measured:

# %%
say(f"""
- **Q12: how do you handle long contexts?** Exact: tiled attention, chunked prefill, paged KV. Lossy: {SIZES[0]} kept
  tokens give a perplexity of {found["window"][0]:.0f} as a window, {found["sinks + window"][0]:.0f} with the first four among them, and
  {found["heavy hitters"][0]:.0f} as heavy hitters; all tokens {dense:.0f}.
- **Q12, follow-up: why do four tokens matter so much?** In layer {of_first.index(max(of_first))} the first token receives
  **{max(of_first):.0%}** of all attention, whatever it says. Without it softmax moves that weight to tokens that mean something.
- **Q12, a correction: positions as in the text?** Then the sinks move out of the range that the model was made for: perplexity
  {far[False]:.0f} instead of {far[True]:.0f} with {SIZES[-1]} kept tokens.
""")
