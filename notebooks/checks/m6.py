"""The exercises of m6."""

from collections.abc import Callable, Sequence

import torch

from common import SamplingParams
from common.memory import kv_bytes_per_token
from common.models.sources.random_weights import PRESETS
from notebooks.exercises import answered, check, expect, expect_equal, tiny

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
BLOCK = 4
BLOCK_BYTES = BLOCK * kv_bytes_per_token(PRESETS["tiny-llama"], torch.float32)


@check
def reusable(answer: Callable[[list[int], list[list[int]], int], int]) -> str:
    """answer(prompt, earlier, block_size) -> tokens of the prompt that come from the cache, held against m6."""
    a, b, c, d = ([10 * n + i for i in range(4)] for n in range(1, 5))  # four blocks of 4 tokens
    for prompt, earlier, why in (
        ([*a, *b, 1, 2], [[*a, *b, 9, 9]], "two full blocks are the same"),
        ([*a, *b, 1, 2], [[*c, *d, 9]], "nothing is the same"),
        ([*a, 1, 2, 3, 4], [[*a, 1, 2, 9, 9, 9]], "the second block is the same up to its middle"),
        ([*a, *b, 1], [[*c, *b, 1]], "the second block has the same tokens, behind another first one"),
        ([*a, *c, *b, 1], [[*a, *b, 1]], "what was a second block is a third one now"),
        ([*a, *b], [[*a, *b, 1]], "the whole prompt is cached, its last token too"),
        ([*a, *b, *c, 1], [[*a, *b, 1], [*a, *d, 1]], "two earlier prompts begin alike"),
        ([*a, *b, *c, 1], [[*a, *b, 9], [*a, *b, *c, 9]], "the later of two prompts has more"),
    ):
        with tiny("m6", block_size=BLOCK) as engine:
            for one in earlier:
                engine.generate([one], ONE)
            [output] = engine.generate([prompt], ONE)
        got = answer(list(prompt), [list(one) for one in earlier], 4)
        case = f"The prompt {prompt} after {' and '.join(map(str, earlier))}, blocks of 4 ({why})"
        expect_equal(got, output.num_cached_tokens, case)
    return "Full blocks, from the first one on, as long as the chain holds, and never the last token."


@check
def blocks_held(answer: Callable[[int, int, int, int], int]) -> str:
    """answer(requests, shared, own, block_size) -> blocks that they hold together, held against m6."""
    for requests, shared, own in ((1, 16, 4), (4, 16, 4), (4, 16, 6), (4, 18, 4), (3, 0, 8), (8, 30, 1)):
        with tiny("m6", block_size=BLOCK, max_num_seqs=8) as engine:
            prompts = [[*range(1, shared + 1), *[200 + number] * own] for number in range(requests)]
            engine.generate(prompts, ONE)
            used = int(engine.metrics()["kv_reserved_peak_bytes"] or 0) // BLOCK_BYTES
        got = answer(requests, shared, own, 4)
        alone = requests * -(-(shared + own) // 4)
        hint = "That is what they need without sharing." if got == alone else ""
        case = f"{requests} prompts of {shared} shared tokens and {own} of their own, at once, blocks of 4, on m6"
        expect_equal(got, used, case, hint)
    few = answer(64, 1024, 32, 16)
    return f"64 requests with 1,024 shared tokens and 32 of their own hold {few:,} blocks instead of {64 * 66:,}."


@check
def hits(answer: Callable[[Sequence[str], int], Sequence[bool]]) -> str:
    """answer(names, room) -> for each request whether its beginning was cached, held against m6 in a small pool."""
    for names, room in (("AABB", 2), ("ABAB", 2), ("ABCABC", 2), ("ABCABC", 3), ("ABACADAEA", 2), ("ABCADBAC", 3)):
        wanted: list[bool] = []
        memory = (room + 1) * BLOCK_BYTES  # one block more, for the last token of each prompt
        with tiny("m6", block_size=BLOCK, kv_cache_memory=memory, max_num_seqs=1) as engine:
            for name in names:
                [output] = engine.generate([[ord(name)] * 4 + [1]], ONE)
                wanted.append(output.num_cached_tokens > 0)
        got = [bool(one) for one in answered(answer(names, room))]
        expect_equal(len(got), len(names), f"The number of answers for {', '.join(names)}")
        for number, (said, found) in enumerate(zip(got, wanted, strict=True)):
            what = f"request {number + 1} ({names[number]}) {'finds' if said else 'does not find'} its beginning"
            case = f"{', '.join(names)} with room for {room}: you say that {what}"
            right = f"In m6 it {'finds it' if found else 'does not'}. Which was *used* least recently?"
            expect(said == found, f"{case}. {right}")
    return "A hit makes its block the newest again. In A, B, C, A, B, C with room for two none ever hits."
