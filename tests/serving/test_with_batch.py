"""`batch`: every line is answered once and in order, whatever it holds and whenever the batch was killed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.cli import batch as module
from common.cli.batch import answers as answered
from common.cli.batch import batch
from common.config import EngineConfig
from common.engine import Engine
from common.errors import UserError
from common.serving import batch as serving
from common.serving.batch import custom_id, read_lines
from stages.m3_paged_kv.engine import build as build_m3
from tests.serving.running import ROOT, TINY, wait_until
from tests.test_cli import byte_tokenizer, cli

CONFIG = EngineConfig(TINY, device="cpu", max_num_seqs=4)


def build(config: EngineConfig) -> Engine:
    engine = build_m3(config)
    engine.tokenizer = byte_tokenizer()
    return engine


def request(name: object, url: str = "/v1/completions", **body: Any) -> bytes:
    given = {"model": TINY, "max_tokens": 3, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": given}).encode()


def short(name: object) -> bytes:
    return request(name, prompt=[random.Random(str(name)).randrange(200), 7], max_tokens=2)


def here(build: Any) -> Any:
    return partial(answered, build, CONFIG, None)


def run(folder: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    batch(folder / "in.jsonl", folder / "out.jsonl", here(build))
    return answers(folder)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_answers_are_the_server_s_in_the_form_of_a_batch(tmp_path: Path) -> None:
    chat = request("b", "/v1/chat/completions", messages=[{"role": "user", "content": "Hé"}], n=2)
    first, second = run(tmp_path, [request("a", prompt="hello"), b"", b"  ", chat])
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert first["custom_id"] == "a" and second["custom_id"] == "b" and first["error"] is None
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 3
    assert first["response"]["request_id"] in body["id"] and first["response"]["request_id"] in first["id"]
    assert len(second["response"]["body"]["choices"]) == 2
    assert second["response"]["body"]["object"] == "chat.completion"


BAD = [
    (b"no JSON", 400, "parse the JSON"),
    (b'"a text"', 400, "JSON object"),
    (b"\xff\xfe{}", 400, "parse the JSON"),
    (b"[" * 100_000, 400, "parse the JSON"),
    (b'{"custom_id": 5}', 400, "custom_id"),
    (b'{"custom_id": NaN, "method": "POST"}', 400, "custom_id"),
    (b'{"custom_id": "x", "method": "GET"}', 400, "method"),
    (b'{"custom_id": "x", "method": "POST", "url": "/v1/embeddings"}', 400, "url"),
    (b'{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": []}', 400, "body"),
    (request("x", prompt="a", stream=True), 400, "not streamed"),
    (request("x", prompt="a", model="another"), 404, "another"),
    (request("x", prompt="a", best=3), 400, "Unknown parameter"),
    (request("x", prompt="a" * 512), 400, "maximum context length"),
    (request("x", prompt="a", n=9), 400, "answers asked for"),
    (request("x", prompt=[1] * 3, temperature=float("inf")), 400, "temperature"),
    (request("\ud800 \x7f\r", prompt="a", max_tokens=0), 400, "max_tokens"),
    (request("x", "/v1/chat/completions", messages=[]), 400, "messages"),
]  # fmt: skip


def test_a_bad_line_is_answered_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [line for bad, _, _ in BAD for line in (bad, short("good"))]
    found = run(tmp_path, lines)
    assert [answer["custom_id"] for answer in found] == [custom_id(line) for line in lines]
    for (_, status, says), answer in zip(BAD, found[::2], strict=True):
        response = answer["response"]
        assert response["status_code"] == status and says in response["body"]["error"]["message"], answer
        assert answer["error"] is None
    assert {answer["response"]["status_code"] for answer in found[1::2]} == {200}
    before = (tmp_path / "out.jsonl").read_bytes()
    run(tmp_path, lines)
    assert (tmp_path / "out.jsonl").read_bytes() == before, "all of them are done"


def test_it_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    lines = [short(f"r{i}") for i in range(12)]
    whole = [json.loads(json.dumps(answer)) for answer in run(tmp_path, lines)]
    text = (tmp_path / "out.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    for cut in (0, 5, ends[3] - 1, ends[3], ends[3] + 1, ends[6] - 40, len(text) - 1):
        (tmp_path / "out.jsonl").write_bytes(text[:cut])
        again = run(tmp_path, lines)
        kept = sum(end <= cut for end in ends)
        assert again[:kept] == whole[:kept]
        assert [a["custom_id"] for a in again] == [a["custom_id"] for a in whole]
        assert [a["response"]["body"]["choices"] for a in again] == [a["response"]["body"]["choices"] for a in whole]


def test_answers_to_other_requests_are_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, [short("a"), short("b")])
    for lines in ([short("a"), short("c")], [short("a")], [short("b"), short("a"), short("c")]):
        with pytest.raises(UserError, match="holds answers to other requests"):
            run(tmp_path, lines)
    (tmp_path / "out.jsonl").write_bytes(b"not an answer\n")
    with pytest.raises(UserError, match=r"other requests \(line 1\)"):
        run(tmp_path, [short("a")])


def test_few_lines_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory does not grow with the file; and one that takes long does not hold up the engine."""
    opened: list[int] = []
    reads = 0

    def counted(*given: Any) -> Any:
        nonlocal reads
        reads += 1
        return watched(*given) if reads == 3 else read_lines(*given)  # behind those that count, and that resume

    def watched(*given: Any) -> Any:
        for number, line in enumerate(read_lines(*given), start=1):
            opened.append(number - (tmp_path / "out.jsonl").read_bytes().count(b"\n"))
            yield line

    monkeypatch.setattr(module, "read_lines", counted)
    monkeypatch.setattr(serving, "AHEAD", 2)
    lines = [request(str(i), prompt=[i % 200], max_tokens=40 if i == 3 else 1) for i in range(60)]
    assert len(run(tmp_path, lines)) == 60
    assert len(opened) == 60 and 4 < max(opened) <= 9, "AHEAD for each of four that can run, and one"


def test_long_lines_count_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    def kept(config: EngineConfig) -> Engine:
        engines.append(build(config))
        return engines[0]

    monkeypatch.setattr(serving, "OPEN_BYTES", 1)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(short(str(i)) for i in range(8)))
    batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", here(kept))
    assert len(answers(tmp_path)) == 8 and engines[0].trace is not None
    assert max(len(step.chunks) for step in engines[0].trace.steps) == 1, "one at a time"


def test_a_kill_loses_no_line_and_doubles_none(tmp_path: Path) -> None:
    lines = [short(f"r{i}") for i in range(1500)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "stages.m6_prefix_caching", "batch", "--model", TINY, "--device", "cpu"]
    command += [str(tmp_path / "in.jsonl"), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: out.exists() and out.stat().st_size > 30_000)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = out.read_bytes().count(b"\n")
    assert 0 < done < 1500
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and f"after {done} that were in" in ended.stderr, ended.stderr
    assert [answer["custom_id"] for answer in answers(tmp_path)] == [f"r{i}" for i in range(1500)]


def test_one_batch_writes_a_file_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(short("a"))
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run(tmp_path, [short("a")])
    with files[1].open("ab", buffering=0) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another batch"):
            batch(*files, here(build))
    assert len(run(tmp_path, [short("a"), short("b")])) == 2


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [("none.jsonl", "out.jsonl", "No such file"), ("in.jsonl", "none/out.jsonl", "No such file"),
     ("in.jsonl", ".", "Is a directory"), ("in.jsonl", "in.jsonl", "the same file")],
)  # fmt: skip
def test_files_that_cannot_be_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str, says: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(short("a"))
    given = [str(tmp_path / source), str(tmp_path / target), "--model", TINY]
    assert cli("batch", *given, build=build) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert (tmp_path / "in.jsonl").read_bytes() == short("a")


def test_a_failing_step_is_an_answer_too(tmp_path: Path) -> None:
    engines: list[Engine] = []

    def failing(config: EngineConfig) -> Engine:
        engine = build(config)
        engines.append(engine)
        step = engine.step

        def one() -> Any:
            if any(len(r.prompt_token_ids) == 5 for r in engine.scheduler.running):
                raise RuntimeError("out of order")
            return step()

        engine.step = one
        return engine

    lines = [short("a"), request("bad", prompt=[9] * 5), short("b")]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", here(failing))
    found = answers(tmp_path)
    assert [answer["custom_id"] for answer in found] == ["a", "bad", "b"]
    assert all(answer["response"]["status_code"] in (200, 500) for answer in found)
