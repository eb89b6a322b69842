"""The command line of a stage, in one process; the few cases that need a terminal or a signal start their own."""

from __future__ import annotations

import builtins
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from common.cli import run_app, stage_app
from common.cli.chat import Conversation, chat
from common.cli.generate import figures, parse_token_ids, run
from common.cli.options import ENGINE, SAMPLING, fastest_dtype
from common.config import EngineConfig, stage_options
from common.engine import Engine
from common.errors import UserError
from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from common.text.tokenizer import Tokenizer
from stages import build
from stages.m1_kv_cache.engine import build as build_m1

ROOT = Path(__file__).parent.parent
M1 = ROOT / "stages" / "m1_kv_cache"
TINY = ["--model", "random:tiny-llama", "--device", "cpu", "--dtype", "fp32"]


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, so that the tiny models, which have 512 tokens, can talk."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(fast, chat_template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:")


def build_talking(config: EngineConfig) -> Engine:
    engine = build_m1(config)
    engine.tokenizer = byte_tokenizer()
    return engine


def cli(*arguments: str, build: object = build_m1) -> int:
    """Exit status of `python -m stages.m1_kv_cache ...`."""
    with pytest.raises(SystemExit) as end:
        run_app(stage_app(M1, build), arguments)  # pyright: ignore[reportArgumentType]
    assert isinstance(end.value.code, int)
    return end.value.code


def pipe(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


# -- help and bad input ------------------------------------------------------------------------------------------------


def test_help_pages_name_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    page = capsys.readouterr().out
    assert all(command in page for command in ("demo", "generate", "chat", "serve", "bench", "diff"))
    assert cli("generate", "--help") == 0
    page = capsys.readouterr().out
    flags = {name: f"--{name.replace('_', '-')}" for name in (*ENGINE, *SAMPLING)}
    later = [flags[name] for name in ENGINE if name not in stage_options(1, ENGINE)]
    assert "--block-size" in later
    assert [flag for flag in flags.values() if flag not in page] == later
    assert cli("serve", "--help") == 0
    page = capsys.readouterr().out
    assert "--api-key" in page and "--max-num-seqs" in page and "--temperature" not in page


def test_every_engine_option_has_a_flag() -> None:
    """A stage that brings an option to EngineConfig or SamplingParams brings its flag too."""
    assert set(ENGINE) == set(EngineConfig.__dataclass_fields__)
    of_python = {"seed", "stop_token_ids", "logit_bias", "prompt_logprobs"}
    assert set(SAMPLING) == set(SamplingParams.__dataclass_fields__) - of_python


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["generate", "--nonsense"], "--nonsense"),
        (["generate", "x", "--temperature", "hot"], "--temperature"),
        (["generate", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "x", "--dtype", "int3"], "Choose from"),
        (["generate", "x", "--model", "no-such-model"], "Choose from"),
        (["generate", "hello", *TINY], "no tokenizer"),
        (["generate", "--token-ids", "1,x", *TINY], "list of token ids"),
        (["generate", "--token-ids", "1,512", *TINY], "outside of the vocabulary"),
        (["generate", "--token-ids", "1", "--max-tokens", "512", *TINY], "max_model_len=512"),
        (["generate", "--token-ids", "1", "--kv-cache-memory", "10", *TINY], "kv_cache_memory"),
        (["chat", *TINY], "no tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    def broken(config: EngineConfig) -> Engine:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_app(stage_app(M1, broken), ["generate", "x"])


def test_no_prompt_at_all_says_how_to_give_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "\n\n")
    assert cli("generate", *TINY) == 2
    assert "holds no prompt" in capsys.readouterr().err
    pipe(monkeypatch, b"\xff\xfe\n")
    assert cli("generate", *TINY) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: EngineConfig) -> Engine:
        raise KeyboardInterrupt

    assert cli("generate", "x", build=interrupted) == 130
    assert "Traceback" not in capsys.readouterr().err


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_streams_in_input_order_and_reports_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    texts = [",".join(map(str, p)) for p in prompts]
    assert cli("generate", "--token-ids", *texts, "--max-tokens", "5", "--max-num-seqs", "2", *TINY) == 0
    out, err = capsys.readouterr()
    with build("m1", model="random:tiny-llama", device="cpu") as engine:
        expected = [o.token_ids for o in engine.generate(prompts, SamplingParams(max_tokens=5))]
    assert [[int(t) for t in line.split()] for line in out.splitlines()] == expected
    assert "15 tokens" in err
    assert all(word in err for word in ("tokens/s", "TTFT", "TPOT", "m1"))


def test_generate_reads_standard_input_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one\r\n\ntwo\n")
    options = ["--json", "--max-tokens", "4", "--logprobs", "2", "--stop", "zzz", "--ignore-eos"]
    assert cli("generate", *options, *TINY, build=build_talking) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in results] == ["one", "two"]
    assert all(len(r["token_ids"]) == 4 and r["finish_reason"] == "length" for r in results)
    assert all(len(r["logprobs"]) == 4 and r["ttft_s"] > 0 for r in results)


def test_pieces_written_add_up_to_the_text() -> None:
    pieces: list[str] = []
    with build_talking(EngineConfig("random:tiny-llama", device="cpu", max_num_seqs=2)) as engine:
        params = SamplingParams(max_tokens=20, temperature=1.0, logprobs=None)
        outputs = run(engine, ["first", "second", "third"], params, pieces.append)
    assert "".join(pieces) == "".join(f"{output.text}\n" for output in outputs)
    assert len(pieces) > 10


def test_an_interrupt_while_text_is_written_aborts_every_request() -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with build_talking(EngineConfig("random:tiny-llama", device="cpu", max_num_seqs=2)) as engine:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        with pytest.raises(KeyboardInterrupt):
            run(engine, ["first", "second", "third"], params, interrupt)
        assert [output.finish_reason for output in engine.step()] == ["abort"] * 3
        assert not engine.has_unfinished


def test_figures_of_one_token_leave_out_what_there_is_not() -> None:
    with build("m1", model="random:tiny-llama", device="cpu") as engine:
        line = figures(engine, engine.generate([[1]], SamplingParams(max_tokens=1)))
    assert "TTFT" in line
    assert "TPOT" not in line


def test_token_ids_are_read_with_commas_or_spaces() -> None:
    assert parse_token_ids("12, 7 301,4") == [12, 7, 301, 4]
    with pytest.raises(UserError, match="whole numbers"):
        parse_token_ids("1.5")


def test_auto_dtype_is_one_that_the_machine_computes_in() -> None:
    assert fastest_dtype("cpu") in ("bf16", "fp32")


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_answers_each_line_of_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    original = Conversation.prompt

    def spy(self: Conversation, question: str) -> list[int]:
        seen.append(f"{len(self.messages)} {question}")
        return original(self, question)

    monkeypatch.setattr(Conversation, "prompt", spy)
    pipe(monkeypatch, "hi\n\nagain\n/reset\n/what\nanew\n/quit\nnever\n")
    assert cli("chat", "--max-tokens", "4", "--system", "be brief", *TINY, build=build_talking) == 0
    out, err = capsys.readouterr()
    assert seen == ["0 hi", "2 again", "0 anew"]
    assert err.count("tokens/s") == 3
    assert "/what is no command" in err
    assert out.endswith("\n")


def test_conversation_forgets_the_oldest_turns_first() -> None:
    tokenizer = byte_tokenizer()
    conversation = Conversation(tokenizer, room=40, system="S")
    conversation.add("old" * 5, "x")
    conversation.add("new", "y")
    prompt = tokenizer.decode(conversation.prompt("q"))
    assert prompt == "s:S;u:new;a:y;u:q;a:"
    with pytest.raises(UserError, match="shorten it"):
        conversation.prompt("q" * 50)


def test_variables_of_a_template_come_from_the_engine_and_from_a_request() -> None:
    messages = [{"role": "user", "content": "q"}]
    config = EngineConfig("random:tiny-llama", device="cpu", chat_template_kwargs='{"a": "one"}')  # type: ignore[arg-type]
    with build_m1(config) as engine:
        engine.tokenizer = byte_tokenizer()
        engine.tokenizer.use_template("{{ a }}{{ messages[0].content }}", engine.config.chat_template_kwargs)  # type: ignore[arg-type]
        one = SamplingParams(max_tokens=1)
        two = {"a": "two"}
        engine.add_request(messages, one, chat_template_kwargs=two)
        outputs = [engine.generate([messages], one)[0], engine.generate([messages], one, chat_template_kwargs=two)[0]]
        outputs += [output for output in engine.stream([messages], one, chat_template_kwargs=two) if output.finished]
        assert [engine.tokenizer.decode(o.prompt_token_ids) for o in outputs] == ["oneq", "twoq", "twoq"]
        with pytest.raises(UserError, match="chat_template_kwargs"):
            engine.generate([messages], one, chat_template_kwargs={"tools": []})
    with pytest.raises(UserError, match="chat_template_kwargs"):
        EngineConfig("random:tiny-llama", chat_template_kwargs="[]")
    with pytest.raises(UserError, match="chat_template is"):
        EngineConfig("random:tiny-llama", chat_template=5)  # type: ignore[arg-type]


def test_chat_needs_a_chat_template() -> None:
    def without(config: EngineConfig) -> Engine:
        engine = build_talking(config)
        engine.tokenizer = byte_tokenizer()
        engine.tokenizer.chat_template = None
        return engine

    with pytest.raises(UserError, match="no chat template"):
        chat(without, EngineConfig("random:tiny-llama", device="cpu"), SamplingParams(), None)


@pytest.mark.parametrize("end", ["/quit", EOFError], ids=["quit", "end of input"])
def test_a_chat_in_a_terminal_ends_with_quit_and_with_the_input(
    end: str | type[EOFError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["hi", end])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", type_line)
    pipe(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert cli("chat", "--max-tokens", "4", *TINY, build=build_talking) == 0
    err = capsys.readouterr().err
    assert "/quit ends it" in err and err.count("tokens/s") == 1


def build_slow(config: EngineConfig) -> Engine:
    """Slow enough that an answer can be interrupted."""
    engine = build_talking(config)
    step = engine.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(0.02)
        return step()

    engine.step = slow_step
    return engine


class Terminal:
    """`chat` with a pseudo-terminal as its input, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        program = (
            "import sys, tests.test_cli as t; from common.cli import run_app, stage_app;"
            "run_app(stage_app(t.M1, t.build_slow), sys.argv[1:])"
        )
        command = [sys.executable, "-c", program, *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.unread, self.all = "", ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read on until `text` has come, and no further."""
        while text not in self.unread:
            self.read()
        self.unread = self.unread.partition(text)[2]

    def wait_for_answer(self) -> None:
        """Read some twenty characters beyond the end of the line that was typed."""
        self.wait_for("\n")
        while len(self.unread) < 20:
            self.read()

    def read(self) -> None:
        ready, _, _ = select.select([self.master], [], [], 60)
        assert ready, f"no more output after: {self.all[-300:]!r}"
        text = os.read(self.master, 4096).decode(errors="replace")
        self.unread += text
        self.all += text

    def wait_until_it_listens(self) -> None:
        """Python's input() writes its prompt before it listens, and forgets a signal that comes in between; when it
        listens it sleeps."""
        self.wait_for("> ")
        for _ in range(3000):
            state = subprocess.run(["ps", "-o", "state=", "-p", str(self.process.pid)], capture_output=True).stdout
            if state.startswith(b"S"):
                return
            time.sleep(0.02)
        raise AssertionError("it never slept")

    def end(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.master)


def test_chat_in_a_terminal_survives_errors_and_ctrl_c_which_ends_it_at_the_prompt_with_130() -> None:
    terminal = Terminal("chat", "--max-tokens", "400", "--ignore-eos", *TINY)
    terminal.wait_for("> ")
    terminal.type("x" * 200 + "\n")
    terminal.wait_for("shorten it")
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for_answer()
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("stopped")
    terminal.wait_until_it_listens()
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("interrupted")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.all


# -- bench, diff -------------------------------------------------------------------------------------------------------


def test_bench_hands_everything_to_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def become(program: str, command: Sequence[str]) -> None:
        commands.append(command)
        raise SystemExit(130)

    monkeypatch.setattr("common.cli.app.os.execv", become)
    assert cli("bench", "--workload", "single", "--quick") == 130
    expected = ["-m", "benchmarks", "compare", "--stages", "m1", "--workload", "single", "--quick"]
    assert commands == [[sys.executable, *expected]]
