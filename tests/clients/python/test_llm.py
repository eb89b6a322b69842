"""The command-line tool `llm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel


@pytest.fixture
def home(tmp_path: Path, url: str, model: str) -> Path:
    entry = f"- model_id: here\n  model_name: {model}\n  api_base: {url}\n  supports_schema: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    return tmp_path


def llm(home: Path, *words: str) -> str:
    command = [sys.executable, "-m", "llm", "prompt", "-m", "here", "--key", "none", *words]
    result = subprocess.run(
        command, env=os.environ | {"LLM_USER_PATH": str(home)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_a_prompt(home: Path, more: list[str]) -> None:
    words = ["What is the capital of France?", "-o", "max_tokens", "12", "-o", "temperature", "0", *more]
    assert "Paris" in llm(home, *words)


def test_a_schema(home: Path, weather: type[BaseModel]) -> None:
    answer = llm(home, "The weather in Paris?", "--schema", json.dumps(weather.model_json_schema()))
    weather.model_validate_json(answer)
