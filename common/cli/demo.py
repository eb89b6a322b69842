"""`demo`: the idea of a stage at work, on a few requests and next to the stage before it."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from common.arena.figures import FIGURES, PEAK, verdict
from common.cli.diff import first_sentence, lessons
from common.cli.generate import ready_engine, show_choices
from common.cli.scenes.scenes import SCENES, Scene
from common.cli.scenes.view import Ask, View
from common.config import EngineConfig, stage_options
from common.engine import Build
from common.execution.parallel.start import on_ranks
from common.memory import kv_bytes_per_token
from common.models.load import open_source


def demo(folder: Path, build: Build, config: EngineConfig) -> None:
    """What the stage is, from its README; its scene on the stage before and on itself; what to try next."""
    console, number = Console(highlight=False), int(folder.name[1])
    scene, stage = SCENES[number if number < len(SCENES) else 2], f"stage{number}"  # a stage of yours: m2's
    asks, options = fitted(scene, config)
    longest = 8 if scene.watch == "together" else max(ask.prompt for ask in asks)  # what is timed is warmed up
    readme = folder / "README.md"  # written last: until then, the name and the first sentence of the wiring
    own_words = f"{folder.name.replace('_', ' ')}\n{first_sentence(folder / 'engine.py')}"
    title, _, rest = (readme.read_text(encoding="utf-8") if readme.exists() else own_words).partition("\n")
    console.print(title.lstrip("# "), style="bold")
    console.print(" ".join(rest.strip().split("\n\n")[0].split()), markup=False)
    console.print(f"\n{' '.join((scene.draw.__doc__ or '').split())}", style="dim", markup=False)
    figures, scale = list[tuple[str, dict[str, float | None]]](), 0.0
    for one in [*sorted(folder.parent.glob(f"m{number - 1}_*")), folder]:
        module = f"{folder.parent.name}.{one.name}.engine"
        make = build if one == folder else on_ranks(importlib.import_module(module).build)
        with ready_engine(make, replace(config, **stage_options(int(one.name[1]), options)), longest) as engine:
            console.print(f"\n{one.name.replace('_', ' ')}", style="bold")
            with Live(console=console, auto_refresh=False) as live:
                view = View(engine, asks, live, one == folder, scale)
                said = scene.draw(view)
                live.refresh()
            console.print("" if console.is_terminal else "\n", f"{engine.stage}: {said}", sep="", markup=False)
            if one == folder:
                show_choices(engine)
            figures.append((engine.stage, view.figures()))
            scale = view.scale
    for watch in scene.watch.split() if len(figures) > 1 else ():
        before, own = (one[watch] or 0.0 for _, one in figures)
        better = FIGURES.get(watch, PEAK).more_wins == (own > before)
        console.print(f"\n{verdict(watch, figures)}", style="bold" if better else "", markup=False)
    files = ", ".join(lesson.path.relative_to(folder).as_posix() for lesson in lessons(folder))
    console.print(f"\nThe code: {files}.\nNext: `make {stage} diff`, `chat`, `bench`, `trace`.", style="dim")


def fitted(scene: Scene, config: EngineConfig) -> tuple[list[Ask], dict[str, Any]]:
    """The scene's requests and the options of both engines; all shorter for a model that is too short for them."""
    model = open_source(config.model, config.torch_device, progress=None).config
    prompt, output = max(ask.prompt for ask in scene.asks), max(ask.output for ask in scene.asks)
    share = min(1.0, max(1, model.max_position_embeddings - output) / prompt)
    options = {"max_model_len": int(share * prompt) + output, **scene.options}
    if "prefill_chunk_size" in options:
        options["prefill_chunk_size"] = max(1, int(share * options["prefill_chunk_size"]))
    options["kv_cache_memory"] = scene.kv_tokens * kv_bytes_per_token(model, config.torch_dtype)
    asks = [replace(a, prompt=max(1, int(share * a.prompt)), shared=int(share * a.shared)) for a in scene.asks]
    return asks, options
