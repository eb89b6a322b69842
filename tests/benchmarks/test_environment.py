"""Where figures come from."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.environment import ROOT, environment


def test_a_carried_copy_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_COMMIT", "1234abc")
    found = environment()
    assert found["commit"] == "1234abc" and found["uncommitted_changes"] is False


def test_otherwise_git_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLOVLLM_COMMIT", raising=False)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert environment()["commit"] == (head.stdout.strip() or None)
