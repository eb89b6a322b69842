"""The eight scenes. Each runs on the stage and on the stage before it, and draws what the engine did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.text import Text

from common.arena.terminal import COLOURS, STEPS
from common.cli.scenes.view import IDLE, Ask, View
from common.kv_cache import PagedManager, PrefixCache
from common.watch.peak_memory import ActivationPeak
from common.watch.trace import StepRecord

WIDTH, LINE = 76, 76  # most characters of a row of steps or of the KV memory, and of a line of an answer


@dataclass(frozen=True)
class Scene:
    """draw: runs it; its docstring says what is seen, its result what was found. watch: what both stages are
    compared by, keys of `View.figures`. kv_tokens: room of the KV memory; options: further ones of both engines.
    """

    draw: Callable[[View], str]
    watch: str
    asks: tuple[Ask, ...]
    kv_tokens: int = 4096
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def size(count: float) -> str:
    """Bytes, as `12.3 MB`."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} KB"


def time_per_token(view: View) -> str:
    """One request, a line for every dozen of its tokens. Without a cache each step computes the whole sequence again:
    tokens take longer and longer; with one, its bytes grow instead."""
    times: list[float] = []
    positions = 0
    for step in view.steps():
        times.append(step.duration)
        positions += sum(chunk.length for chunk in step.chunks)
        if len(times) % 12 == 0:
            computes = f"token {len(times):3} computes {step.chunks[0].length:3} positions"
            kept = int(view.engine.metrics()["kv_used_peak_bytes"] or 0)
            view.add(f"{computes}, KV {size(kept):>8}", sum(times[-12:]) / 12)
    growth = sum(times[-12:]) / sum(times[1:13])
    computed = f"{positions:,} positions computed for {len(times)} tokens"
    return f"{computed}; a token of the last dozen took {growth:.1f} times as long as one of the first."


def joining(view: View) -> str:
    """Eight requests, room for four; steps go to the right. P: reads its prompt, d: makes a token, -: has ended and is
    computed all the same, ·: waits. A static batch waits for its longest answer; from m2 on the next request joins at
    once."""
    for _ in view.steps():
        steps = list(view.trace.steps)
        column = -(-len(steps) // WIDTH)
        last = {chunk.request_id: step.index for step in steps for chunk in step.chunks}
        view.lines.clear()
        for id in view.trace.arrivals:
            row = Text.assemble((f"{id} ", "bold"))
            for first in range(0, len(steps), column):
                kinds = {c.kind for step in steps[first : first + column] for c in step.chunks if c.request_id == id}
                waits = (" ", "") if first > last.get(id, len(steps)) else ("·", "bright_black")
                row.append(*next((what for kind, what in STEPS.items() if kind in kinds), waits))
            view.add(row)
    padding = view.engine.metrics()["padding_share"]
    return f"{len(view.trace.steps)} steps; {padding:.0%} of the computed positions were padding or finished requests."


def memory(view: View, step: StepRecord) -> Text:
    """The KV memory, a character for each block: its owner's letter, small where it is still empty."""
    cache, block = view.engine.scheduler.cache, view.engine.config.block_size
    cells = [("·", "bright_black")] * min(WIDTH, cache.usage().capacity // block)
    for region in [*(cache.kept_regions() if isinstance(cache, PrefixCache) else ()), *(step.regions or ())]:
        for offset in range(0, region.length, block):
            if (cell := (region.start + offset) // block) < len(cells):
                mark = region.owners[0] if len(region.owners) == 1 else f"{len(region.owners) or '▒'}"
                colour = COLOURS[ord(mark) % len(COLOURS)] if region.owners else "white"
                cells[cell] = (mark if offset < region.stored else mark.lower(), colour)
    return Text.assemble(*cells)


def blocks(view: View) -> str:
    """Eight requests in memory for 256 tokens; time goes down. A: filled by request A, a: held for A and still empty,
    ·: free. Whole rows of 128 hold two requests; blocks of 16 are taken when a token needs one, and given back."""
    most, tables = 0, dict[str, list[int]]()
    for step in view.steps():
        if step.index % 5 == 0 or step.preempted:
            lost = f", {' '.join(step.preempted)} preempted" if step.preempted else ""
            state = f" {step.running} run, {step.waiting} wait{lost}"
            view.add(Text(f"step {step.index:3} ") + memory(view, step) + Text(state))
        cache = view.engine.scheduler.cache
        if isinstance(cache, PagedManager) and step.running >= most:
            most, tables = step.running, {id: list(table) for id, table in cache.tables.items()}
    for id, table in tables.items():
        view.add(f"block table of {id}: {' '.join(map(str, table))}")
    use = view.engine.metrics()["kv_utilization"]
    return f"{view.figures()['together']} requests at most at once; {use:.0%} of the reserved slots were filled."


def scores(view: View) -> str:
    """Three prompts, each twice as long as the one before: full scores grow four times. Then the online softmax for the
    last token (layer 0, head 0), block by block: m is the largest score so far, l the sum of exponentials, acc that of
    the weighted values; a larger score rescales both sums."""
    heads = view.engine.runner.model.config.num_heads
    steps, extra, seen = view.steps(), "", _spy_on_layer_0(view)
    while True:
        with ActivationPeak(view.engine.config.torch_device) as peak:
            step = next(steps, None)
        if step is None:
            break
        extra = "not known here" if peak.bytes is None else size(peak.bytes)
        view.peak = None if peak.bytes is None else max(view.peak or 0.0, peak.bytes / 1e6)
        length = step.chunks[0].length
        written = "no score matrix" if view.own else f"{size(4 * heads * length**2):>8} scores"
        view.add(f"{length:5} tokens, {written}, held {extra:>8}", step.duration)
    if view.own:
        _walk(view, *seen)
    return f"the step of the longest prompt held {extra} more than there was before it."


def _spy_on_layer_0(view: View) -> list[torch.Tensor]:
    """What attention last got and gave for the last token's head 0: q [D], k and v [tokens, D], output [D]."""
    attention, seen = view.engine.runner.attention, list[torch.Tensor]()
    attend = attention.attend

    def spy(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(layer, q, k, v)
        if layer == 0:
            seen[:] = [x.double().cpu() for x in (q[-1, 0], k[:, 0], v[:, 0], out[-1, 0])]
        return out

    setattr(attention, "attend", spy)  # noqa: B010 - for a type checker it is a method
    return seen


def _walk(view: View, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    m_i, l_i, acc = -torch.inf, 0.0, torch.zeros_like(q)
    tile, tiles = view.engine.config.block_size, -(-len(k) // view.engine.config.block_size)
    for number, (keys, values) in enumerate(zip(k.split(tile), v.split(tile), strict=True)):
        s = keys @ q * len(q) ** -0.5
        higher = max(m_i, float(s.max()))
        rescale = float(torch.tensor(m_i - higher).exp())
        p = (s - higher).exp()
        m_i, l_i, acc = higher, rescale * l_i + float(p.sum()), rescale * acc + p @ values
        if rescale < 1 or number in (1, tiles // 2, tiles - 1):
            state = f"m {m_i:6.2f}  l {l_i:7.2f}  |acc| {float(acc.norm()):6.2f}"
            view.add(f"block {number:3}: {len(s)} scores  {state}  rescaled x {rescale:.2f}")
    off = float((acc / l_i - out).abs().max() / out.abs().max())
    view.add(f"acc / l at the end is the engine's own output, to {off:.1e} of its maximum")


def per_step(view: View) -> str:
    """A and B make tokens when C arrives with a long prompt; a line for each step. Before m5 the prompt is one long
    step, for which A and B wait; m5 reads it in chunks, in the same steps as their tokens."""
    for step in view.steps():
        if step.index:  # the first one reads the short prompts
            parts = [f"{c.request_id} {'+1' if c.kind == 'decode' else f'reads {c.length}'}" for c in step.chunks]
            view.add(f"step {step.index:2}  " + "  ".join(parts), step.duration)
    gap, first = max(max(view.outputs[id].itl) for id in "AB"), view.outputs["C"].ttft or 0.0
    return f"A and B wait {1e3 * gap:.0f} ms at most between two tokens; C has its first after {1e3 * first:.0f} ms."


def hits(view: View) -> str:
    """Three prompts with the same first 480 tokens: A alone, then B and C together. Below, the memory while B and C
    run: a letter is a block of that request, 2 a block that both share, ▒ one of A's that is kept, · a free one."""
    shared = Text()
    for step in view.steps():
        shared = memory(view, step) if step.running > 1 or not shared else shared
        view.lines.clear()
        for id, output in view.outputs.items():
            cached, length = output.num_cached_tokens, len(output.prompt_token_ids)
            view.add(f"{id}: {cached:3} of {length} prompt tokens cached; first token after", output.ttft or 0.0)
        view.add(shared)
    metrics = view.engine.metrics()
    found = f"{metrics['prefix_hit_rate'] or 0:.0%} of the prompt tokens were in the cache"
    return f"{found}; B and C shared {metrics['blocks_shared_peak'] or 0} blocks."


def weights(view: View) -> str:
    """A short answer. Each token reads all weights of the layers and of the output head: in 4 bits those are fewer
    bytes. The answers may part at some word: 4 bits round."""
    model = view.engine.runner.model
    parts = {"layers": sum(layer.weights_bytes() for layer in model.layers), "head": model.head.weights_bytes()}
    for name, count in parts.items():
        view.add(f"weights read for every token: {name:6}", count, size(count))
    begin = len(view.lines)
    for _ in view.steps():
        del view.lines[begin:]
        text = " ".join(view.outputs["A"].text.split())
        for start in range(0, min(len(text), 4 * LINE), LINE):
            view.add(text[start : start + LINE])
    read, speed = sum(parts.values()), view.figures()["speed"] or 0.0
    return f"{size(read)} for every token, {speed:.0f} times a second: {read * speed / 1e9:.1f} GB/s of weights."


SHORT = tuple(Ask(12, output) for output in (40, 6, 10, 6, 28, 8, 6, 12))
MIXED = tuple(Ask(*one) for one in ((20, 48), (36, 12), (8, 60), (28, 24), (16, 36), (40, 16), (12, 40), (24, 20)))
DOUBLING = Ask(256, 1), Ask(512, 1, IDLE), Ask(1024, 1, IDLE)
LATE = Ask(16, 12), Ask(16, 12), Ask(1000, 3, 4)
ALIKE = Ask(500, 4, shared=480), Ask(500, 8, IDLE, shared=480), Ask(500, 8, shared=480)
QUESTION = Ask(128, 64, text="Why is the sky blue? Answer in two sentences.")
SCENES = (  # by the number of their stage
    Scene(time_per_token, "time", (Ask(16, 96),)),
    Scene(time_per_token, "time", (Ask(16, 96),)),
    Scene(joining, "speed", SHORT, options={"max_num_seqs": 4}),
    Scene(blocks, "together", MIXED, kv_tokens=256, options={"max_model_len": 128}),
    Scene(scores, "peak time", DOUBLING, options={"cuda_graphs": False}),
    Scene(per_step, "gap", LATE, options={"prefill_chunk_size": 256}),
    Scene(hits, "ttft", ALIKE, kv_tokens=1216),
    Scene(weights, "speed", (QUESTION,)),
)
