"""The walk over the layers: what each one is calibrated on, resuming, and refusals before the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

from common import UserError
from common.models import load_model
from common.models.decoder import PROJECTIONS
from common.models.load import open_source
from common.models.sources.gptq_folder import GPTQFolder
from common.models.weights import build_decoder
from common.text.tokenizer import Tokenizer
from stages.m7_gptq import calibrate
from stages.m7_gptq.calibrate import QuantizedLayer
from stages.m7_gptq.checkpoint import quantize as quantize_module
from stages.m7_gptq.checkpoint.baselines import METHODS, RTN, quantize_layers
from stages.m7_gptq.checkpoint.quantize import cached_folder, quantize, recipe_of
from stages.m7_gptq.checkpoint.texts import DATA, LENGTH, SEQUENCES, calibration_tokens, tokens
from stages.m7_gptq.checkpoint.write import Writer
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.helpers import all_logits, freeze
from tests.m7.conftest import Frozen, GetMade, Make
from tests.m7.stopping import quantize_with_a_stop
from tests.models.processes import start

CPU = torch.device("cpu")
DOWN = "model.layers.0.mlp.down_proj"
SETTINGS = Settings(group_size=32, symmetric=True)
ROUNDED = RTN(group_size=32, symmetric=True)


def walk(model: str, token_ids: torch.Tensor, settings: Settings = SETTINGS) -> list[QuantizedLayer]:
    with torch.inference_mode():
        return list(quantize_layers(open_source(model), token_ids, settings, CPU))


@pytest.mark.parametrize("model", TINY)
def test_gptq_stays_closer_to_the_model_than_rounding(
    model: str, frozen: Frozen, made: GetMade, token_ids: torch.Tensor
) -> None:
    plain = load_model(frozen(model))
    text = token_ids[0].tolist()
    wanted = all_logits(plain, text)
    errors: list[float] = []
    for options in ({}, {"method": "rtn"}):
        decoder = load_model(frozen(model))
        for layer, result in zip(decoder.layers, made(model, **options).layers, strict=True):
            for name in PROJECTIONS:
                linear = getattr(layer, name)
                linear.weight = result.weights[name].dequantize()
                assert (result.weights[name].bias is None) == (linear.bias is None)
        errors.append(float((all_logits(decoder, text) - wanted).square().mean()))
    assert errors[0] < errors[1]


def test_each_projection_is_calibrated_on_what_quantised_ones_before_it_give(
    frozen: Frozen, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record every Hessian; compute the same by hand, with a decoder whose earlier projections are quantised."""
    seen: list[torch.Tensor] = []
    real = calibrate.gptq

    def recording(weight: torch.Tensor, hessian: torch.Tensor, *rest: object) -> object:
        seen.append(hessian.clone())
        return real(weight, hessian, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "gptq", recording)
    layers = walk(frozen(TINY[0]), token_ids)
    decoder = load_model(frozen(TINY[0]))
    order = [(layer, name) for layer in range(2) for name in PROJECTIONS]
    for step, (layer, name) in enumerate(order):
        linear = getattr(decoder.layers[layer], name)
        inputs: list[torch.Tensor] = []

        class Spy:
            def __call__(self, x: torch.Tensor, linear=linear, inputs=inputs) -> torch.Tensor:
                inputs.append(x)
                return linear(x)

        setattr(decoder.layers[layer], name, Spy())
        for row in token_ids:
            all_logits(decoder, row.tolist())
        x = torch.cat(inputs)
        assert torch.allclose(seen[step], 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4), (layer, name)
        linear.weight = layers[layer].weights[name].dequantize()
        setattr(decoder.layers[layer], name, linear)


def test_a_stopped_run_goes_on_and_ends_the_same(
    made: GetMade, frozen: Frozen, tmp_path: Path, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "calibration_tokens", lambda tokenizer, path: token_ids)
    whole = build_decoder(GPTQFolder(made(desc_act=True).folder), torch.float32, CPU, False)
    real, calls = calibrate.gptq, []

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    out, settings = tmp_path / "out", Settings(group_size=32, symmetric=True, desc_act=True)
    monkeypatch.setattr(calibrate, "gptq", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize(frozen(TINY[0]), settings, out, progress=False)
    assert not out.exists()
    quantize(frozen(TINY[0]), settings, out, progress=False)
    assert len(calls) == 6 + 4, "only the second layer was quantised again"
    resumed = build_decoder(GPTQFolder(out), torch.float32, CPU, False)
    assert torch.equal(all_logits(whole, [1, 2, 3]), all_logits(resumed, [1, 2, 3]))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".") and p.suffix != ".lock"] == []


def test_other_settings_do_not_go_on_with_a_stopped_run(make: Make, tmp_path: Path) -> None:
    unfinished = tmp_path / ".made-4bit-g32-sym-gptq-unfinished"
    unfinished.mkdir()
    (unfinished / "work.json").write_text("{}")
    (unfinished / "model-00001-of-00003.safetensors").write_text("what another run left")
    GPTQFolder(make()).check()


def test_a_whole_folder_is_not_made_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    before = (folder / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(quantize_module, "quantize_layers", None)
    assert make() == folder and (folder / "config.json").stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_not_taken_for_this_one(frozen: Frozen, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", RTN(group_size=32, symmetric=True)
    quantize(frozen(TINY[0]), settings, out, progress=False)
    other = RTN(group_size=32, symmetric=True, bits=8)
    with pytest.raises(UserError, match=r"made otherwise \(bits\)"):
        quantize(frozen(TINY[0]), other, out, progress=False)
    quantize(frozen(TINY[0]), other, out, again=True, progress=False)
    assert GPTQFolder(out).stored.bits == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"search": False}, "search"), ({"damping": 0.05}, "damping"), ({"desc_act": True}, "desc_act")],
)
def test_two_settings_never_share_a_folder(
    frozen: Frozen, made: GetMade, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, changes: Any, word: str
) -> None:
    monkeypatch.setattr(quantize_module, "calibration_tokens", lambda tokenizer, path: token_ids)
    model, one = frozen(TINY[0]), made(symmetric=False).folder
    other = Settings(group_size=32, **changes)
    assert cached_folder(model, Settings(group_size=32)) != cached_folder(model, other)
    assert quantize(model, Settings(group_size=32), one, progress=False).losses == [], "it lies there"
    with pytest.raises(UserError, match=rf"made otherwise \({word}\)"):
        quantize(model, other, one, progress=False)


def test_a_cached_folder_of_another_model_text_or_version_is_never_taken(
    frozen: Frozen, token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has one name for them, and makes the model anew: for one weight of any tensor, too."""
    monkeypatch.setattr(quantize_module, "calibration_tokens", lambda tokenizer, path: token_ids)
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    model, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text("one")
    freeze(TINY[0], model)

    def made_anew() -> bool:
        return bool(quantize(str(model), Settings(search=False), text=text, progress=False).losses)

    assert made_anew() and not made_anew()
    text.write_text("another")
    assert made_anew() and not made_anew()
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"):
        weights = load_file(model / "model.safetensors")
        weights[name][3, 5] += 1
        save_file(weights, model / "model.safetensors")
        assert made_anew() and not made_anew()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert made_anew() and not made_anew()
    for words in ("a b", "a b c"):
        backend = FastTokenizer(WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="a"))
        Tokenizer(backend).save(model)
        assert made_anew() and not made_anew()
    monkeypatch.setattr(quantize_module, "VERSION", 2)
    assert made_anew() and not made_anew()
    assert len([path for path in (tmp_path / "gptq").iterdir() if path.is_dir()]) == 1


def test_a_checkpoint_is_never_quantised_again(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        quantize(str(saved), RTN(), tmp_path / "out", progress=False)


def wait_for(what: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < 100
        time.sleep(0.01)


def test_two_processes_never_write_into_one_folder(frozen: Frozen, tmp_path: Path) -> None:
    """The second waits, says so, and takes what the first has made."""
    out, one, two = (tmp_path / name for name in ("out", "one", "two"))
    first = start(one, quantize_with_a_stop, frozen(TINY[0]), out, 1)
    wait_for((tmp_path / ".out-unfinished").is_dir)
    second = start(two, quantize_with_a_stop, frozen(TINY[0]), out, 0)
    wait_for(lambda: two.exists() and "waiting for it\n" in two.read_text())
    (tmp_path / "go").touch()
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0), one.read_text() + two.read_text()
    assert one.read_text().endswith("8 projections\n") and two.read_text().endswith("0 projections\n")
    assert "another process is quantising" in two.read_text()
    GPTQFolder(out).check()


def test_a_process_that_was_killed_keeps_no_lock_and_leaves_no_half_model(frozen: Frozen, tmp_path: Path) -> None:
    """As Ctrl-C ends a worker of the bench. The next process goes on where the first was."""
    out, one, two = (tmp_path / name for name in ("out", "one", "two"))
    first = start(one, quantize_with_a_stop, frozen(TINY[0]), out, 5)
    wait_for((tmp_path / ".out-unfinished" / "model-00001-of-00003.safetensors").is_file)
    first.kill()
    first.join()
    assert not out.exists()
    second = start(two, quantize_with_a_stop, frozen(TINY[0]), out, 0)
    second.join()
    assert two.read_text().endswith("4 projections\n"), "only the second layer was quantised again"
    assert "waiting" not in two.read_text()
    GPTQFolder(out).check()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("method", "part", "damage"),
    [
        ("rtn", f"{DOWN}.scales", lambda part: part * torch.nan),
        ("rtn", f"{DOWN}.qweight", lambda part: part[1:].clone()),
        ("rtn", "model.layers.0.input_layernorm.weight", lambda part: part * torch.nan),
        ("gptq", "model.layers.0.self_attn.q_proj.g_idx", lambda part: part.flip(0).contiguous()),
        ("nf4", f"{DOWN}.weight", torch.zeros_like),
        ("nf4", f"{DOWN}.weight.absmax", lambda part: part[1:].clone()),
        ("nf4", f"{DOWN}.weight", None),
    ],
)
def test_a_damaged_shard_of_a_stopped_run_is_made_again(
    method: Any, part: str, damage: Any, again: bool, frozen: Frozen, token_ids: torch.Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is made anew; and with `again` whatever lies there is. It must not come back or stay for ever."""
    monkeypatch.setattr(quantize_module, "calibration_tokens", lambda tokenizer, path: token_ids)
    settings = METHODS[method](desc_act=method == "gptq")
    source, out = open_source(frozen(TINY[0])), tmp_path / "out"
    writer = Writer(source, settings, out, recipe_of(source, settings, None, False))
    with torch.inference_mode():
        writer.add(0, next(quantize_layers(source, token_ids, settings, CPU)))
    assert writer.finished(0) is not None
    path = next(writer.work.glob("*.safetensors"))
    tensors = load_file(path)
    whole = dict(tensors)
    tensors |= {part: damage(tensors[part])} if damage else {}
    if damage is None:
        del tensors[part]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    quantize(frozen(TINY[0]), settings, out, again=again, progress=False)
    made = load_file(out / path.name)
    assert made.keys() == whole.keys() and all(torch.equal(made[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["x" * 300, "out"])
def test_a_folder_that_cannot_be_made_is_refused(name: str, frozen: Frozen, tmp_path: Path) -> None:
    (tmp_path / ".out-old").write_text("in the way")
    with pytest.raises(UserError, match="another --out") as caught:
        quantize(frozen(TINY[0]), ROUNDED, tmp_path / name, progress=False)
    assert len(str(caught.value)) < 400
    with pytest.raises(UserError, match="cannot be written"):
        quantize(frozen(TINY[0]), ROUNDED, Path("/proc/nothing"), progress=False)


def test_a_model_with_a_long_path_gets_a_short_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    names = [cached_folder("/".join([letter * 90] * 5), SETTINGS).name for letter in "ab"]
    assert all(len(name) < 200 and name.endswith("4bit-g32-sym-gptq") for name in names) and names[0] != names[1]


def test_a_text_that_rtn_does_not_use_is_refused(frozen: Frozen, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rtn looks at no text"):
        quantize(frozen(TINY[0]), RTN(), tmp_path / "out", text=tmp_path / "text.txt", progress=False)


def test_activations_that_are_not_finite_are_refused(frozen: Frozen, token_ids: torch.Tensor) -> None:
    source = open_source(frozen(TINY[0]))
    read = source.read

    def poisoned(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = read(name, shape)
        return tensor * float("nan") if name == "model.layers.1.input_layernorm.weight" else tensor

    source.read = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite"), torch.inference_mode():
        list(quantize_layers(source, token_ids, SETTINGS, CPU))


@pytest.mark.parametrize("factor", [float("nan"), 1e9], ids=["nan", "too large"])
def test_weights_that_no_scale_can_hold_are_refused(factor: float, frozen: Frozen, token_ids: torch.Tensor) -> None:
    source = open_source(frozen(TINY[0]))
    read = source.read

    def poisoned(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = read(name, shape)
        return tensor * factor if name == "model.layers.1.mlp.up_proj.weight" else tensor

    source.read = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match="layer 1, gate_up_proj"), torch.inference_mode():
        list(quantize_layers(source, token_ids, ROUNDED, CPU))


def test_too_little_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Only a few words.")
    with pytest.raises(UserError, match="too few"):
        calibration_tokens(tokenizer, short)
    with pytest.raises(UserError, match="cannot be read"):
        calibration_tokens(tokenizer, tmp_path / "missing.txt")
    with pytest.raises(UserError, match="no tokenizer"):
        calibration_tokens(None)


def test_the_texts_are_long_enough_and_share_no_paragraph(tokenizer: Tokenizer) -> None:
    assert calibration_tokens(tokenizer).shape == (SEQUENCES, LENGTH)
    assert len(tokens(tokenizer, DATA / "evaluation.txt")) >= 30 * 1024
    calibration, evaluation = (
        {p for p in (DATA / f"{name}.txt").read_text(encoding="utf-8").split("\n\n") if len(p) > 60}
        for name in ("calibration", "evaluation")
    )
    assert not calibration & evaluation


def test_a_folder_that_is_no_model_is_not_overwritten(frozen: Frozen, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no quantised model"):
        quantize(frozen(TINY[0]), RTN(), tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_random_weights_are_not_worth_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random"):
        quantize(TINY[0], RTN(), tmp_path / "out", progress=False)
