"""Where figures come from."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import environment as module
from benchmarks.environment import ROOT, environment


def test_a_carried_copy_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_COMMIT", "1234abc")
    found = environment()
    assert found["commit"] == "1234abc" and found["uncommitted_changes"] is False


def test_otherwise_git_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLOVLLM_COMMIT", raising=False)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert environment()["commit"] == (head.stdout.strip() or None)


def test_a_host_of_several_gpus_names_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "_output", lambda *command: asked.append(command) or "a card")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert environment()["hardware"]["gpu"] == "a card"
    assert all("--id=3" in command for command in asked if command[0] == "nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment()["hardware"]["gpu"] is None
