"""What structured output costs on a CPU: the other requests' speed beside one that is structured, and the masks of
llguidance and, where it is installed, xgrammar. `python -m benchmarks.structured`"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import stages
from benchmarks.environment import environment
from benchmarks.files import write_json
from common.engine import Engine
from common.sampling.grammar import compile_matcher
from common.sampling.structure import Structures
from common.sampling_params import SamplingParams

NODE = {"type": "object", "required": ["next"], "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}},
}  # fmt: skip
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "person": (PERSON, {"name": "Ada Lovelace, countess", "age": 36}),
    "list": ({"type": "array", "items": PERSON, "minItems": 60}, [{"name": f"No. {i}", "age": i} for i in range(60)]),
    "JSON object": ({"type": "object"}, {"a": [1, 2.5, None, {"text": "The quick brown fox"}], "b": True}),
    "recursive type": (NODE, {"next": {"next": {"next": None}}}),
}
"""Each with an answer that fits."""
OTHERS, SKIPPED, STEPS = 15, 3, 8  # requests beside the one, and steps of a turn: left out, and counted


def others_speed(model: str, overlap: bool, turns: int) -> dict[str, Any]:
    """Tokens a second of 15 greedy requests beside a 16th that is free, beside one that is structured, and beside
    none, in turns."""
    shape: dict[str, Any] = {"dtype": "bf16", "max_num_seqs": OTHERS + 1, "max_model_len": 2048, "overlap": overlap}
    with stages.build("m6", model=model, device="cpu", **shape) as engine:
        endless = SamplingParams(max_tokens=1800, ignore_eos=True)
        for number in range(OTHERS):
            engine.add_request([5 + number] * 32, endless, request_id=f"{number}")
        structured = SamplingParams(max_tokens=1800, schema=SCHEMAS["list"][0])
        engine.compile_structure(structured)
        beside: dict[str, SamplingParams | None] = {"free": endless, "structured": structured, "none": None}
        speeds: dict[str, list[float]] = {name: [] for name in beside}
        for turn in range(turns):
            for name in (*beside, *reversed(beside))[3 * (turn % 2) :][:3]:
                speeds[name].append(_speed(engine, beside[name]))
    ratios = np.array(speeds["structured"]) / speeds["free"]
    low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
    medians = {f"tokens_per_s_beside_{name}": float(np.median(values)) for name, values in speeds.items()}
    of = f"speed of {OTHERS} others, {'planned ahead' if overlap else 'step by step'}"
    return {"of": of, "ratio": median, "quartiles": f"{low:.3f} to {high:.3f}", **medians, "turns": turns}


def _speed(engine: Engine, params: SamplingParams | None) -> float:
    one, gained, seconds = params and engine.add_request([7] * 8, params), 0, 0.0
    for step in range(SKIPPED + STEPS):
        began = time.perf_counter()
        outputs = engine.step()
        if step >= SKIPPED:
            seconds += time.perf_counter() - began
            gained += sum(output.request_id != one for output in outputs)
    if one is not None:
        engine.abort(one)
        engine.step()
    return gained / seconds


def mask_costs(model: str) -> list[dict[str, Any]]:
    """Seconds to compile each schema, and for a token: its mask, and to take it."""
    with stages.build("m6", model=model, device="cpu", max_num_seqs=1, max_model_len=64) as engine:
        assert engine.tokenizer is not None
        backend, ends = engine.tokenizer.backend, sorted(engine.tokenizer.eos_token_ids)
        size = engine.runner.model.config.vocab_size
        vocabulary = Structures(engine.tokenizer, size, ends).vocabulary

    def of_llguidance(schema: str) -> tuple[Callable[[], Any], Callable[[int], bool]]:
        matcher, words = compile_matcher(vocabulary, "schema", schema), np.zeros(-(-size // 32), dtype=np.int32)
        return lambda: matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes), matcher.consume_token

    makers = {"llguidance": of_llguidance}
    try:
        xgrammar: Any = importlib.import_module("xgrammar")
    except ImportError:
        pass
    else:
        names = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        kind = xgrammar.VocabType.BYTE_LEVEL
        info = xgrammar.TokenizerInfo([n for n, _ in names], kind, vocab_size=size, stop_token_ids=ends)
        compiler, bits = xgrammar.GrammarCompiler(info, max_threads=1), xgrammar.allocate_token_bitmask(1, size)

        def of_xgrammar(schema: str) -> tuple[Callable[[], Any], Callable[[int], bool]]:
            matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema, strict_mode=False))
            return lambda: matcher.fill_next_token_bitmask(bits), matcher.accept_token

        makers["xgrammar"] = of_xgrammar
    rows: list[dict[str, Any]] = []
    for library, make in makers.items():
        for name, (schema, answer) in SCHEMAS.items():
            began = time.perf_counter()
            mask, take = make(json.dumps(schema))
            mask()
            compiled, costs = time.perf_counter() - began, list[float]()
            for token in backend.encode(json.dumps(answer), add_special_tokens=False).ids:
                began = time.perf_counter()
                mask()
                assert take(token), f"{library}: {name} refuses {token}"
                costs.append(time.perf_counter() - began)
            worst, token = max(costs), float(np.median(costs))
            of = f"mask of {library}, schema of a {name}"
            rows.append({"of": of, "first_mask_s": compiled, "token_s": token, "token_max_s": worst})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="reports/local/structured.json")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=12)
    given = parser.parse_args()
    rows = mask_costs(given.model) + [others_speed(given.model, overlap, given.turns) for overlap in (False, True)]
    config = {"model": given.model, "device": "cpu"}
    write_json(given.out, {"schema": "structured-1", "environment": environment(), "config": config, "rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
