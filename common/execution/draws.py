"""How each row of a step draws its token, as tensors that never move: what a CUDA graph reads instead of requests.

`draw` is `common.sampler.sample` over these tensors, in PyTorch; `gpu.triton_draw` is the same in kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from common.execution.upload import upload
from common.models.ops import Ops
from common.request import Request
from common.sampling.adjust import apply_penalties, biased_logits, ending_ids, filter_logits
from common.sampling.structure import allowed
from common.sampling_params import MAX_BIASES

SETTINGS = 8
"""Columns of `settings`: temperature, top_k, top_p, min_p, repetition, presence and frequency penalty, and whether the
row wants log-probabilities."""
KEYS = 4
"""Columns of `keys`: the seed, the position to choose for, the first one at which no token is banned, the slot."""
POSITION = 1
SEEN, ONE, COUNT, BANNED = 1, 2, 0x7FFE, -(1 << 15)
"""Marks of a token: the prompt has it; the output has it once more; the bits of that count; it must not come yet."""


class Kind(IntFlag):
    """What a row needs; a step needs all that its rows do."""

    LIKELIEST = 0
    DRAWN = 1  # a temperature
    SHARED = 2  # also top_p and min_p
    RANKED = 4  # also top_k
    MARKED = 8  # penalties, logit_bias, min_tokens, log-probabilities, drawn or not


WAYS = Kind.LIKELIEST, Kind.DRAWN, Kind.DRAWN | Kind.SHARED, Kind.DRAWN | Kind.SHARED | Kind.RANKED
KINDS = [*WAYS, *(way | Kind.MARKED for way in WAYS)]
"""All there are, each a graph."""


@dataclass(slots=True)
class Draws:
    """S rows: settings [S, SETTINGS] float32, keys [S, KEYS] int64. For each slot: marks [slots, vocab] int16; tokens
    [slots] int64, what was drawn last; biased [slots, MAX_BIASES] int64 and bias (float32), the tokens of its
    `logit_bias`, the first one repeated to the end. raw [S, vocab]: the model's logits, kept for log-probabilities."""

    settings: torch.Tensor
    keys: torch.Tensor
    marks: torch.Tensor
    tokens: torch.Tensor
    raw: torch.Tensor
    biased: torch.Tensor
    bias: torch.Tensor


Draw = Callable[[torch.Tensor, Draws, Kind], None]
"""draw(logits [S, vocab], draws, kind): chooses each row's token, writes it into `tokens`, and marks it."""


def draw_biased(way: Draw, logits: torch.Tensor, draws: Draws, kind: Kind) -> None:
    """`way` of logits with `logit_bias` added, in place; `raw` keeps the model's own."""
    if not kind & Kind.MARKED:
        return way(logits, draws, kind)
    slots = draws.keys[:, 3]
    tokens = draws.biased[slots]
    own = logits.gather(1, tokens)
    logits.scatter_(1, tokens, biased_logits(own, draws.bias[slots]))
    way(logits, draws, kind)
    draws.raw.scatter_(1, tokens, own)


def draw(logits: torch.Tensor, draws: Draws, kind: Kind) -> None:
    """Without waiting for the device, so that a graph can repeat it."""
    seeds, positions, free_from, slots = draws.keys.unbind(1)
    if kind == Kind.LIKELIEST:
        draws.tokens[slots] = Ops().sample(logits)
        return
    temperature, top_k, top_p, min_p, *penalties = draws.settings[:, :, None].unbind(1)[:7]
    if kind & Kind.MARKED:
        draws.raw.copy_(logits)
        marks = draws.marks[slots]
        logits = apply_penalties(logits, (marks & ~BANNED) != 0, (marks & COUNT) // ONE, *penalties)
        logits = logits.masked_fill((marks < 0) & (positions < free_from)[:, None], -torch.inf)
    if kind & Kind.SHARED:
        logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    token_ids = Ops().sample(logits, temperature[:, 0], uniforms(seeds, positions))
    draws.tokens[slots] = token_ids
    if kind & Kind.MARKED:
        marks = draws.marks[slots, token_ids]
        draws.marks[slots, token_ids] = torch.where((marks & COUNT) < COUNT, marks + ONE, marks)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`common.sampler.uniform` of each, [S] int64 to [S] float64. 64-bit products wrap around here as there."""
    z = seeds * _signed(0xD1342543DE82EF95) + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


class RequestDraws:
    """The rows' settings by slot, on the host; and the marks, which are on the device and change with each token there.
    One slot more than requests: for rows of padding."""

    def __init__(self, count: int, vocab: int, device: torch.device) -> None:
        self.settings = np.zeros((count + 1, SETTINGS), dtype=np.float32)
        self.keys = np.zeros((count + 1, KEYS), dtype=np.int64)
        self.kinds = np.zeros(count + 1, dtype=np.int64)
        self.marks = torch.zeros(count + 1, vocab, dtype=torch.int16, device=device)
        self.biased = torch.zeros(count + 1, MAX_BIASES, dtype=torch.long, device=device)
        self.bias = torch.zeros(count + 1, MAX_BIASES, device=device)
        self._has_bias = [False] * (count + 1)
        self.settings[:, 1:5] = vocab, 2.0, 0.0, 1.0
        self.keys[:, 3] = np.arange(count + 1)

    def enter(self, slot: int, request: Request) -> None:
        """A request takes the slot. All its tokens are known: it had none, or was absent from a step."""
        p, vocab = request.params, self.marks.shape[1]
        temperature, top_p = 0.0 if p.greedy else p.temperature, p.top_p if p.top_p < 1.0 else 2.0
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        self.settings[slot, :7] = temperature, min(p.top_k or vocab, vocab), top_p, p.min_p, *penalties
        self.settings[slot, 7] = p.logprobs is not None
        seed = np.uint64(request.seed).astype(np.int64)
        free_from = request.num_prompt_tokens + p.min_tokens if p.min_tokens else 0
        structured = request.structure is not None
        self.keys[slot] = seed, 0, 2**62 if structured else free_from, slot
        marked = p.penalised or p.min_tokens > 0 or structured
        biased = bool(p.logit_bias)
        kind = Kind.MARKED if marked or biased or p.logprobs is not None else Kind.LIKELIEST
        if not p.greedy:
            kind |= WAYS[3 if p.top_k else 2 if p.filters else 1]
        self.kinds[slot] = kind
        if marked:
            self._mark(self.marks[slot], request)
        if biased or self._has_bias[slot]:
            self._has_bias[slot] = biased
            tokens, values = zip(*p.logit_bias.items(), strict=True) if biased else ((0,), (0.0,))
            for row, given in ((self.biased[slot], np.array(tokens)), (self.bias[slot], np.array(values))):
                row.copy_(upload(row.device, np.resize(np.append(given, np.full(MAX_BIASES, given[0])), MAX_BIASES))[0])

    def restrict(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Before a draw: mark in each structured request's slot what does not fit."""
        masks = [(s, r.structure.mask()) for s, r in zip(slots, requests, strict=True) if r.structure is not None]
        if masks:
            columns = np.array([slot for slot, _ in masks]), np.stack([mask for _, mask in masks])
            at, words = upload(self.marks.device, *columns)
            rows = self.marks[at] & ~BANNED
            self.marks[at] = torch.where(allowed(words, self.marks.shape[1]), rows, rows | BANNED)

    def _mark(self, row: torch.Tensor, request: Request) -> None:
        vocab, prompt = len(row), request.num_prompt_tokens
        output = np.bincount(request.token_ids[prompt:], minlength=vocab)
        marks = np.minimum(output * ONE, COUNT).astype(np.int16)
        marks[request.token_ids[:prompt]] |= SEEN
        marks[[token for token in ending_ids(request) if token < vocab]] |= BANNED
        row.copy_(upload(row.device, marks)[0])
