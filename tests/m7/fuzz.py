"""Quantised folders with something wrong: each is read, or refused in one line. `python -m tests.m7.fuzz 5000`."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import UserError
from common.models import load_model
from common.models.load import open_source
from stages.m7_gptq.checkpoint.baselines import NF4
from stages.m7_gptq.checkpoint.quantize import quantize
from tests.helpers import freeze
from tests.m7.gptq_writer import Case, write

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, 8, 32, 64, -1, -2, 10**30, 2**63, 4.0, 0.5, 1e300, float("nan"), float("inf")),
    *("", "gptq", "gptq_v2", "nf4", "int32", "4", "x" * 5000, "../x", "\0", "\ud800", "a\nb", "model", "-:.*", "bf16"),
    *([], [4], [[]], {}, {"bits": 4}, {"-:.*q_proj": {}}, {".*": {"bits": 8}}, {"(": {}}, {"x": 5}, {"": {}}, DEEP),
]
WORDS = """bits group_size sym desc_act quant_method checkpoint_format format pack_dtype lm_head dynamic meta method
model_file_base_name w_bit load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant version
bnb_4bit_quant_storage llm_int8_skip_modules rotation adapter modules_in_block_to_quantize unknown""".split()  # noqa: SIM905
DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.uint32),
]


def change_description(chance: random.Random, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    found: Any = config["quantization_config"]
    for _ in range(chance.randint(1, 3)):
        match chance.randrange(6):
            case 0:
                found.pop(chance.choice(list(found)), None) if found else None
            case 1 if chance.random() < 0.3:
                config["quantization_config"] = chance.choice(VALUES)
                break
            case _:
                found[chance.choice([*WORDS, *found])] = chance.choice(VALUES)
    if chance.random() < 0.2:
        (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(chance: random.Random, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for _ in range(chance.randint(1, 2)):
        name = chance.choice(list(tensors))
        tensor = tensors[name]
        match chance.randrange(9):
            case 0:
                del tensors[name]
            case 1:
                tensors[name] = tensor.to(chance.choice(DTYPES))
            case 2:
                tensors[name] = tensor[: chance.randint(0, 3)].contiguous()
            case 3:
                tensors[name] = tensor.reshape(chance.choice([(-1,), (1, *tensor.shape), (*tensor.shape, 1)]))
            case 4:
                tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor.flip(0)
            case 5:
                tensors[chance.choice([*tensors, "lm_head.qweight", "lm_head.bias", name + "x"])] = tensor.clone()
            case 6:
                tensors[name] = (
                    torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8).view(tensor.dtype).view_as(tensor)
                )
            case 7:
                tensors[name] = torch.full_like(tensor, chance.choice([0, 1, 100]))
            case _:
                tensors[name] = torch.zeros(chance.choice([(0,), (), (0, 4), (4, 0)]), dtype=tensor.dtype)
    save_file(tensors, folder / "model.safetensors")


def change_bytes(chance: random.Random, folder: Path) -> None:
    path = folder / chance.choice(["model.safetensors", "config.json"])
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(min(len(data), 6000))] = chance.choice([*b'0129{}[]",:-', 0, 255])
    path.write_bytes(data[: chance.choice([len(data), len(data), len(data) - 1, 100])])


def models(root: Path) -> list[Path]:
    """Valid folders of all kinds, each with one weight file."""
    cases = [
        Case(),
        Case({"lm_head": True}, head={}),
        Case({"dynamic": {".*down.*": {"bits": 8}}}, {".*down.*": {"bits": 8}}),
    ]
    made = [write(root / f"gptq{i}", case) for i, case in enumerate(cases)]
    nf4 = quantize(freeze("random:tiny-qwen2", root / "plain"), NF4(), root / "nf4", progress=False).folder
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(nf4.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (nf4 / "model.safetensors.index.json").unlink()
    save_file(tensors, nf4 / "model.safetensors")
    return [*made, nf4]


def run(root: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Change a valid folder `count` times; how many were read, and how many refused."""
    warnings.simplefilter("ignore")
    chance, valid, outcomes = random.Random(seed), models(root), {"read": 0, "refused": 0}
    torch.manual_seed(seed)
    for number in range(count):
        folder = Path(shutil.copytree(chance.choice(valid), root / "changed"))
        chance.choice([change_description, change_tensors, change_tensors, change_bytes])(chance, folder)
        start = time.perf_counter()
        try:
            load_model(str(folder))
            open_source(str(folder)).tokenizer()
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, f"number {number}: {str(error)[:2000]}"
        except Exception as error:
            shutil.copytree(folder, root / f"failed-{number}")
            raise AssertionError(f"number {number} of seed {seed}: {root}/failed-{number}") from error
        assert time.perf_counter() - start < 5, f"number {number} takes too long"
        shutil.rmtree(folder)
    return outcomes


if __name__ == "__main__":
    where = Path(tempfile.mkdtemp())
    print(run(where, int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
