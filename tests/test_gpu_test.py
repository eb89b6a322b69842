"""`make gpu-test`, without a GPU: what it says and returns when its processes end."""

from __future__ import annotations

import subprocess

import pytest
import torch

from make import gpu_test


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, str]]:
    """Status and output of some of the four; of the others: no test."""
    found: dict[int, tuple[int, str]] = {}

    def run(share: int, shares: int) -> subprocess.CompletedProcess[str]:
        status, output = found.get(share, (5, "no tests ran in 1.00s"))
        return subprocess.CompletedProcess([], status, output)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_test.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(gpu_test, "run", run)
    return found


def test_of_a_share_that_failed_the_last_lines_come_at_the_end(
    shares: dict[int, tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    shares[1] = 0, "3 passed in 2.00s"
    shares[2] = 1, "\n".join([*(f"line {number}." for number in range(100)), "1 failed, 2 passed in 3.00s"])
    assert gpu_test.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-31:-1] == [*(f"line {number}." for number in range(71, 100)), "1 failed, 2 passed in 3.00s"]
    assert "line 70." not in lines
    assert lines[-1].startswith("==== 1 failed, 5 passed in ")


@pytest.mark.parametrize(("status", "output", "returned"), [(0, "2 passed in 1.00s", 0), (5, "no tests ran", 1)])
def test_a_run_without_any_test_fails(
    status: int, output: str, returned: int, shares: dict[int, tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    shares[2] = status, output
    assert gpu_test.main() == returned
    assert ("no test ran" in capsys.readouterr().out) == bool(returned)
