"""The runner: what it writes, what it says when a cell fails; and, slowly, every notebook from its first cell."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from notebooks import pairs
from notebooks.execute import CellFailedError, execute
from notebooks.exercises import check, expect, expect_equal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of `notebooks/`, for the runner."""
    monkeypatch.setattr(pairs, "FOLDER", tmp_path)
    return tmp_path


def test_outputs_are_those_of_the_cells_and_ids_do_not_change(folder: Path) -> None:
    (folder / "m1_small.py").write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 20\nprint(x + 1)\n\n# %%\nx + 2\n")
    counted: list[int] = []
    cells = execute("m1_small", advance=lambda cells, what: counted.append(cells)).cells
    assert [cell.cell_type for cell in cells] == ["markdown", "code", "code"]
    assert cells[1].outputs[0].text == "21\n"
    assert cells[2].outputs[0].data["text/plain"] == "22"
    assert counted == [1, 1]
    assert [cell.id for cell in cells] == ["cell-0", "cell-1", "cell-2"]


def test_a_cell_that_fails_is_named_and_nothing_is_written(folder: Path) -> None:
    (folder / "m1_small.py").write_text("# %%\nx = 1\n\n# %%\n# half of nothing\nx / 0\n")
    (folder / "m1_small.ipynb").write_text("as it was")
    with pytest.raises(CellFailedError) as caught:
        pairs.write_notebook("m1_small", execute("m1_small"))
    assert str(caught.value).startswith("notebooks/m1_small.py:5: the cell `# half of nothing` failed")
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert "x / 0" in caught.value.traceback
    assert (folder / "m1_small.ipynb").read_text() == "as it was"


def test_progress_is_told_while_a_cell_runs_and_is_not_kept(folder: Path) -> None:
    cells = (
        "from notebooks.progress import show_progress\nshow_progress()\n",
        "from common.watch.progress import progress_bar, say\n"
        "with progress_bar('quantising', 3) as advance:\n    say('once')\n    advance(3)\n    print('in the middle')\n",
        "print('no line of the cell before')\n",
    )
    (folder / "m1_small.py").write_text("".join(f"# %%\n{cell}\n" for cell in cells))
    said: list[str] = []
    cells = execute("m1_small", advance=lambda cells, what: said.append(what)).cells
    assert [[output.get("text") for output in cell.outputs] for cell in cells] == [
        [],
        ["in the middle\n"],
        ["no line of the cell before\n"],
    ]
    assert said[1:-1] == ["quantising: 0 of 3, 0 s", "once, 0 s", "quantising: 3 of 3, 0 s", "0 s", ""]


def test_minutes_are_rounded_up_in_the_table_with_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").write_text(
        "| m1 | <!--run:m1_small-->?<!--/--> | <!--run:m2_other-->3 min<!--/--> | on <!--machine-->?<!--/-->.\n"
    )
    monkeypatch.setattr(pairs, "short_hardware", lambda found, device: "a CPU")
    pairs.write_times({"m1_small": 61.0})
    assert (folder / "README.md").read_text() == (
        "| m1 | <!--run:m1_small-->2 min<!--/--> | <!--run:m2_other-->3 min<!--/--> | on <!--machine-->a CPU<!--/-->.\n"
    )


def test_names_are_found_by_their_beginnings_and_read_in_order(folder: Path) -> None:
    for name in ("long_context", "99_compare", "m1_kv_cache", "00_overview", "m0_baseline", "kit", "pairs"):
        (folder / f"{name}.py").touch()
    assert pairs.names() == ["00_overview", "m0_baseline", "m1_kv_cache", "99_compare", "long_context"]
    assert [pairs.find(name) for name in ("m1", "m1_kv_cache", "99")] == ["m1_kv_cache", "m1_kv_cache", "99_compare"]
    with pytest.raises(UserError, match="m1_kv_cache"):
        pairs.find("m9")


def test_a_notebook_that_does_not_exist_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebooks", "m9"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(pairs.FOLDER / "__main__.py"), run_name="__main__")  # `python -m notebooks`, in this process
    assert end.value.code == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "m9" in error


def test_verdicts_say_what_is_wrong() -> None:
    @check
    def doubled(answer: Any) -> str:
        expect_equal(answer(2), 4, "The double of 2")
        expect(answer(0) == 0, "nothing doubled is nothing")
        return "Doubled."

    def unfinished(number: int) -> int:
        raise NotImplementedError

    assert "you say 3, and it is 4" in doubled(lambda n: n + 1).message
    assert "nothing doubled" in doubled(lambda n: 4).message
    assert "return" in doubled(lambda n: None).message
    assert "NotImplementedError" in doubled(unfinished).message
    assert "TypeError" in doubled(lambda: 4).message
    assert doubled(lambda n: 2 * n).right
    assert repr(doubled(lambda n: 2 * n)) == "Right. Doubled."
    assert not doubled(lambda n: n + 1).right


@pytest.mark.slow
@pytest.mark.timeout(3600)  # beside others it may take long; the first one that builds m7 has its 4-bit model made
@pytest.mark.parametrize("name", pairs.names())
def test_every_notebook_runs_from_its_first_cell(name: str) -> None:
    notebook = execute(name)
    pictures = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert pictures
