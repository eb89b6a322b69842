"""Names, random presets, and the hub."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from common import UserError
from common.models import PRESETS, Decoder, load_model, load_tokenizer
from common.models import load as load_module
from common.models.sources import hub as hub_module
from tests.helpers import all_logits, greedy
from tests.models import reference

TINY = [f"random:{preset}" for preset in PRESETS if preset.startswith("tiny")]


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("qwen3-0.6b", 596_049_920), ("qwen3-4b", 4_022_468_096), ("llama3-1b", 1_235_814_400)],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    from common.models.weights import tensor_shapes

    shapes = tensor_shapes(PRESETS[preset])
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


@pytest.mark.parametrize("name", TINY)
def test_random_weights_follow_the_seed(name: str) -> None:
    first, again, other = (all_logits(load_model(name, seed=seed), [1, 2, 3]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_the_same_in_every_dtype(name: str) -> None:
    wide, narrow = load_model(name), load_model(name, dtype="bf16")
    assert torch.equal(wide.embedding.bfloat16(), narrow.embedding)
    assert torch.equal(wide.layers[1].input_norm.weight.bfloat16(), narrow.layers[1].input_norm.weight)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", TINY)
def test_greedy_output_of_random_models_varies(name: str, seed: int) -> None:
    """A constant stream would hide most mistakes of an engine."""
    tokens = greedy(load_model(name, seed=seed), [1, 2, 3], 40)
    assert len(set(tokens)) >= 15
    assert sum(a == b for a, b in itertools.pairwise(tokens)) <= 20


@pytest.mark.parametrize("name", TINY)
def test_random_models_have_no_text(name: str) -> None:
    assert load_tokenizer(name) is None
    assert load_model(name).config.eos_token_ids == ()


def test_unknown_names_are_refused_with_suggestions() -> None:
    assert "Did you mean 'random:tiny-llama'?" in refusal("random:tiny-lama")
    message = refusal("gpt-5")
    assert all(part in message for part in ("smollm2-135m-instruct", "random:qwen3-4b", "folder", "gguf", "hub id"))
    assert "no file" in refusal("nowhere.gguf")
    assert "unknown model" in refusal("./no/such/folder")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert "is a file" in refusal(str(path))


def test_unknown_dtype_and_device_are_refused() -> None:
    with pytest.raises(UserError, match="dtype"):
        load_model("random:tiny-llama", dtype="int4")
    with pytest.raises(UserError, match="device"):
        load_model("random:tiny-llama", device="tpu")


def test_hub_id_loads_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = reference.save("qwen2", tmp_path)
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setattr(load_module, "fetch", fetch)
    ours: Decoder = load_model("Qwen/Qwen2-0.5B")
    assert asked == [ours.config.name] == ["Qwen/Qwen2-0.5B"]
    reference.assert_close(all_logits(ours, [1, 2]), reference.logits(theirs, [1, 2]))


def test_hub_downloads_no_code_and_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    patterns: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_module.fetch("Org/Name") == tmp_path
    for file, wanted in [
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.json", True),
        ("model.safetensors.index.json", True),
        ("chat_template.jinja", True),
        ("pytorch_model.bin", False),
        ("modeling.py", False),
        ("model.gguf", False),
    ]:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns) is wanted, file


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("LocalEntryNotFoundError", "pass the folder"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
        ("RepositoryNotFoundError", "check the spelling"),
        ("GatedRepoError", "hf auth login"),
        ("HfHubHTTPError", "pass the folder"),
    ],
)
def test_hub_failures_say_what_to_do(error: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal("Org/Name")
    assert message.startswith("Org/Name ")
    assert advice in message
