"""Log-probabilities of the tokens of prompts, where they were asked for: how likely the model finds a given text."""

from dataclasses import dataclass

import torch

from common.batch import RaggedBatch
from common.models.decoder import Decoder
from common.plan import StepPlan
from common.request import Request
from common.sampler import SamplerOutput, scored

ROWS = 64  # logits at a time, as many as a decode of 64 requests has: those of a whole prompt may not fit


@dataclass(slots=True)
class PromptScores:
    """Of prompt tokens `first`, `first + 1`, ...; to be entered when the step that computed them has been collected."""

    request: Request
    first: int
    output: SamplerOutput

    def enter(self) -> None:
        known, count = self.request.prompt_logprobs, len(self.output.token_ids)
        if known is not None:
            values = self.output.logprobs(range(count), [self.request.params.prompt_logprobs] * count)
            known[self.first : self.first + count] = values


def score_prompts(model: Decoder, plan: StepPlan, batch: RaggedBatch, hidden: torch.Tensor) -> list[PromptScores]:
    """hidden [T, hidden]: of the batch, before the final norm. A row's logits tell of the token behind it."""
    if not plan.scores_prompts:
        return []
    result: list[PromptScores] = []
    for chunk, (begin, _, _) in zip(plan.chunks, batch.sequences(), strict=True):
        if chunk.scored:
            first, end = chunk.scored.start, chunk.scored.stop
            targets = torch.tensor(chunk.request.prompt_token_ids[first + 1 : end + 1]).to(hidden.device)
            rows = hidden[begin + first - chunk.start : begin + end - chunk.start]
            output = _score(model, rows, targets, chunk.request.params.prompt_logprobs or 0)
            result.append(PromptScores(chunk.request, first + 1, output.start_copy()))
    return result


def _score(model: Decoder, rows: torch.Tensor, targets: torch.Tensor, k: int) -> SamplerOutput:
    """rows [N, hidden], targets [N]. The results have their memory from the start: small tensors that lie behind logits
    and outlive them would keep a CPU's allocator from using that memory again."""
    count, k = len(targets), min(k, model.config.vocab_size)
    top_ids, values = targets.new_empty(count, k), rows.new_empty(count, k + 1, dtype=torch.float32)
    for at in range(0, count, ROWS):
        place = slice(at, at + ROWS)
        part = scored(targets[place], model.logits(rows[place]), k)
        assert part.top_ids is not None and part.top_logprobs is not None and part.sampled_logprobs is not None
        top_ids[place], values[place, :k], values[place, k] = part.top_ids, part.top_logprobs, part.sampled_logprobs
    return SamplerOutput(targets, top_ids, values[:, :k], values[:, k])
