"""The command line of the stage: `quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.m7.conftest import Command, Frozen


def test_the_command_writes_a_folder(command: Command, frozen: Frozen, tmp_path: Path) -> None:
    words = (
        "quantize",
        "--model",
        frozen(TINY[0]),
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--no-sym",
        "--device",
        "cpu",
    )
    status, said = command(*words, "--out", str(tmp_path / "out"))
    assert status == 0, said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sym"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "3"], "bits=3"),
        (["--method", "awq"], "'awq'"),
        (["--model", TINY[0]], "random"),
        (["--group-size", "0"], "group_size=0"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, command: Command, tmp_path: Path) -> None:
    status, said = command("quantize", *words, "--out", str(tmp_path / "out"))
    assert status == 2 and message in said and said.count("\n") == 1
