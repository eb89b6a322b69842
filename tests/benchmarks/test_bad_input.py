"""Bad input ends with one line and status 2; Ctrl-C with 130, no file half written and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.__main__ import app
from benchmarks.files import read_json, write_atomically, write_json
from benchmarks.process import run_worker
from benchmarks.worker import Job
from common.cli import run_app
from common.errors import UserError
from tests.benchmarks.conftest import COMMAND, ENV, ROOT, TINY, run_bench


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command line ends with, its status being 2."""
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "m9"], "unknown stage 'm9'"),
        (["--workload", "mixt"], "unknown workload 'mixt'. Did you mean 'mixed'?"),
        (["--workload", ""], "no workload was named"),
        (["--workload", ","], "no workload was named"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--model", "nope"], "unknown model 'nope'"),
        (["--model", "/nonexistent/x.gguf"], "there is no file /nonexistent/x.gguf"),
        (["--model", "random:nope"], "nope"),
        (["--engine", "blocksize"], "--engine takes NAME=VALUE"),
        (["--engine", "foo=1"], "unknown EngineConfig option 'foo'"),
        (["--stages", "m3", "--engine", "block_size=0"], "block_size must be a whole number"),
        (["--engine", "block_size=8"], "m0 has no option 'block_size': it arrives with m3"),
        (["--engine", "dtype=fp16"], "use --dtype"),
        (["--repeats", "0"], "--repeats"),
        (["--nope"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--model", "random:tiny-llama", *arguments, "--json", str(tmp_path / "bench.json")]
    assert message in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'compair'" in refused(capsys, "compair")


def test_an_unknown_gpu_job_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Choose from: bench, ladder" in refused(capsys, "gpu", "nonsense")


def test_a_place_that_takes_no_files_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.compare.run", lambda *a, **k: pytest.fail("it was measured"))
    file = tmp_path / "a.md"
    file.write_text("text")
    for place in (["--out-dir", str(file)], ["--json", str(file / "b.json")], ["--json", "/proc/none/b.json"]):
        assert "cannot write to" in refused(capsys, "compare", *TINY, *place)
    assert "it is a folder" in refused(capsys, "compare", *TINY, "--json", str(tmp_path))
    assert "cannot write to" in refused(capsys, "trace", "--stage", "m1", "--out-dir", str(file))
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"]


def test_bad_input_through_a_real_command_shows_no_traceback(tmp_path: Path) -> None:
    done = run_bench("report", "--json", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_workers_and_leaves_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    process = subprocess.Popen(
        [*COMMAND, "compare", "--stages", "m0,m1", "--repeats", "100000", "--json", str(path), *TINY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV,
    )  # fmt: skip
    worker = _wait_for_child(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not _alive(worker)
    assert not list(tmp_path.iterdir()), "the first record was not finished, so nothing was written"


def test_a_worker_ends_with_its_parent() -> None:
    job = Job("m1", "ladder", "quick", "random:tiny-llama", "fp32", "cpu", repeats=100000)
    process = subprocess.Popen(
        [COMMAND[0], "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENV,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(asdict(job)) + "\n")
    process.stdin.flush()
    assert "phase" in process.stdout.readline()
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=30) != 0


def test_a_worker_that_takes_too_long_is_stopped_and_reported() -> None:
    job = Job("m1", "ladder", "quick", "random:tiny-llama", "fp32", "cpu", repeats=100000)
    record = run_worker(job, lambda message: None, timeout=0.2)
    assert record.status == "failed"
    assert record.error == "no result after 0.2 s (--timeout)"


def test_a_worker_that_dies_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'no luck\\n')\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = run_worker(Job("m1", "single", "quick", "x", "fp32", "cpu", 1), lambda message: None)
    assert record.status == "failed"
    assert record.error == "the worker ended with status 3 and no result; its last words: no luck"


def test_a_worker_that_the_system_kills_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = run_worker(Job("m1", "single", "quick", "x", "fp32", "cpu", 1, "output=64"), lambda message: None)
    assert (record.status, record.variant) == ("failed", "output=64")
    assert record.error == "the system killed the worker: most likely out of memory"


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_json(path, {"records": [1]})

    def broken(scratch: Path) -> None:
        scratch.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert json.loads(path.read_text()) == {"records": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(("text", "message"), [(None, "cannot read"), ("{", "no JSON file"), ("[]", "no results file")])
def test_foreign_results_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(path)


def _wait_for_child(parent: int) -> int:
    """The worker's process id, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            pid, ppid, arguments = line.split(None, 2)
            if int(ppid) == parent and "benchmarks.worker" in arguments:
                return int(pid)
        time.sleep(0.05)
    raise AssertionError("no worker was started")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
