"""What llama.cpp makes of the texts and tokenizers of tokenizer_cases.py: written to expected_tokens.json.

`python -m tests.models.expected_tokens`, where llama-cpp-python is installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.models.tokenizer_cases import CASES, TEXTS, write_vocabulary

KEPT = Path(__file__).with_suffix(".json")


def tokens_of_llama_cpp(metadata: dict[str, Any]) -> list[list[int]]:
    """Of each text, with the tokens that llama.cpp puts around a prompt."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]


if __name__ == "__main__":
    found = {name: tokens_of_llama_cpp(metadata) for name, metadata in CASES.items()}
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(token_ids, separators=(',', ':'))}" for name, token_ids in found.items()
    )
    KEPT.write_text("{\n" + lines + "\n}\n")
