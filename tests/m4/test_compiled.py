"""The compiled CPU kernels: when they are compiled again, what threads may do with them, how they round."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from numba.core import config

from common.execution import cache
from common.execution.cpu import compiled, cpu_elementwise, simd
from stages.m4_flash_attention.fast.kernels import cpu_decode, cpu_prefill, cpu_store
from tests.helpers import run_in_numbas_own_pool
from tests.test_cli import ROOT

DIVIDE = """
import numpy as np
from common.execution.cpu import simd
from stages.m4_flash_attention.fast.kernels import cpu_decode
out = np.zeros(16, np.float32)
cpu_decode._divide(np.ones(16, np.float32), np.full(1, 4, np.float32), 16, simd.width(16), out, 0)
print(out[0], sum(cpu_decode._divide.stats.cache_hits.values()))
"""


def test_an_edit_of_simd_compiles_the_kernels_again(tmp_path: Path) -> None:
    """The old machine code must not stay in use."""
    for module in (compiled, cpu_decode, cache):
        folder = Path(module.__file__).parent
        copy = tmp_path / folder.relative_to(ROOT)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        for above in (copy.parent, copy.parent.parent):
            if above != tmp_path:
                (above / "__init__.py").touch()
    ours = {"PYTHONPATH": str(tmp_path), "FOLOVLLM_CACHE": str(tmp_path / "cache")}
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | ours

    def divide() -> str:
        command = [sys.executable, "-c", DIVIDE]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout.strip()

    assert [divide(), divide()] == ["0.25 0", "0.25 1"]
    source = Path(compiled.__file__.replace(str(ROOT), str(tmp_path))).with_name("simd.py")
    product = "return builder.fmul(splat(builder, x, vector.type.count), vector, flags=FAST)"
    text = source.read_text()
    assert text.count(product) == 1
    source.write_text(text.replace(product, product.replace("fmul", "fadd")))
    assert divide() == "1.25 0"


def test_checkouts_with_the_same_kernels_share_a_cache_that_is_named_after_them() -> None:
    """A fresh checkout must not compile for minutes what the one next to it has."""
    for kernel in (cpu_decode.decode, cpu_prefill.prefill, cpu_store.rotate_and_store, cpu_elementwise.norm):
        folders = compiled.HERE, Path(kernel.py_func.__code__.co_filename).parent
        name = f"numba-{compiled.digest(compiled.sources(*folders))}"
        assert Path(kernel.stats.cache_path) == Path(os.environ["NUMBA_CACHE_DIR"]) / name


def test_digest_changes_with_every_file_and_its_name(tmp_path: Path) -> None:
    def digest() -> str:
        return compiled.digest(compiled.sources(tmp_path))

    seen = {digest()}
    for name, text in (("cpu_a.py", "x"), ("cpu_a.py", "y"), ("simd.py", ""), ("simd.py", "x")):
        (tmp_path / name).write_text(text)
        seen.add(digest())
    (tmp_path / "simd.py").rename(tmp_path / "cpu_b.py")
    assert len(seen | {digest()}) == 6
    before = digest()
    (tmp_path / "fused.py").write_text("no kernel for Numba")
    assert digest() == before


def test_a_kernel_that_was_moved_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not load machine code that imports a module of where it was before."""
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    found: set[str] = set()
    for folder in (tmp_path / "kernels", tmp_path / "fast"):
        folder.mkdir()
        (folder / "cpu_a.py").write_text("x")
        found.add(compiled.digest(compiled.sources(folder)))
    assert len(found) == 2


def test_kernels_are_cached_where_numba_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made must not end the import."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file"))
    assert compiled._Locator.from_function(cpu_decode.decode.py_func, cpu_decode.__file__) is None


TWO_ENGINES = """
import sys, threading, torch
from stages.m4_flash_attention.fast.backends import cpu
from tests.m4.cases import make_case
torch.set_num_threads(2)
def work(seed):
    case = make_case([(1, 300), (1, 40), (60, 200)], seed=seed)
    backend = cpu.create(case.shape)
    for _ in range(100):
        case.check(backend)
    done.append(seed)
done = []
work(0)
threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(done))
"""


def test_two_engines_in_two_threads_are_right_in_numbas_own_pool() -> None:
    """They must not enter the pool at once."""
    assert run_in_numbas_own_pool(TWO_ENGINES) == "[0, 1, 2]"


@njit
def _store_all(source, target, shape):
    for at in range(0, source.size, 16):
        simd.store(target, at, simd.load(source, at, shape))


@pytest.mark.parametrize(("dtype", "seen_as"), [(torch.bfloat16, np.uint16), (torch.float16, np.int16)])
def test_store_rounds_to_nearest_even(dtype: torch.dtype, seen_as: type) -> None:
    """Bit for bit as PyTorch rounds: every upper half of a float32, exactly between two neighbours and next to that."""
    upper = np.arange(0, 0x7F80, 7, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x1000, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (upper[:, None] | lower).ravel()
    numbers = np.concatenate([bits, bits | np.uint32(1 << 31)])
    numbers = numbers[: numbers.size // 16 * 16].view(np.float32)
    stored = np.zeros(numbers.size, seen_as)
    _store_all(numbers, stored, simd.width(16))
    expected = torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy()
    np.testing.assert_array_equal(stored.view(np.int16), expected)
