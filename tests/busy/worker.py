"""One engine that runs the same small batch when its parent asks: `python worker.py STAGE MODEL`.

A line on standard input is the seconds that a run may take; the answer is a line with its output tokens per second.
"""

import sys
import time

import stages
from common import Engine, SamplingParams

REQUESTS, PROMPT, TOKENS = 8, 8, 64


def rate(engine: Engine, seconds: float) -> float:
    """Output tokens per second of the batch from when all requests have a token, for `seconds` at most."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    for number in range(REQUESTS):
        engine.add_request([(7 * i + 31 * number + 1) % 400 for i in range(PROMPT)], params)
    made: dict[str, int] = {}
    while len(made) < REQUESTS:
        made |= {output.request_id: len(output.token_ids) for output in engine.step()}
    before, began = sum(made.values()), time.perf_counter()
    while engine.has_unfinished:
        made |= {output.request_id: len(output.token_ids) for output in engine.step()}
        if time.perf_counter() - began >= seconds:
            break
    took = time.perf_counter() - began
    for request_id in made:
        engine.abort(request_id)
    while engine.has_unfinished:  # an abort takes effect in a step
        engine.step()
    return (sum(made.values()) - before) / took


def main(stage: str, model: str) -> None:
    options = {"dtype": "bf16", "device": "cpu", "max_num_seqs": REQUESTS, "max_model_len": 2 * (PROMPT + TOKENS)}
    with stages.build(stage, model=model, **options) as engine:
        rate(engine, 60.0)
        print("ready", flush=True)
        for line in sys.stdin:
            print(rate(engine, float(line)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
