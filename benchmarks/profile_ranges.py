"""Names for what a step does, while it is looked at: ranges of PyTorch's profiler, or NVTX ranges for Nsight Systems.

`step 12 decode 64` is the 12th step, of that phase and of 64 tokens: what the runner launches for it. `step` around it
is the engine's whole step, with `plan`, `wait` and `update`. The engine holds none of this: off, it costs nothing.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from typing import Any

from torch.profiler import record_function

from benchmarks.measure import ATTENDS
from benchmarks.profile_parts import ATTENTION, COMPILED, ELEMENTWISE, LINEAR, SAMPLING
from common import Engine, runner
from common.plan import StepPlan

Around = Callable[[str], AbstractContextManager[object]]
"""What a range is made with: `record_function`, `torch.cuda.nvtx.range`."""

OPS = {
    **dict.fromkeys(("norm_linear", "norm_swiglu", "residual_linear"), LINEAR),
    **dict.fromkeys(("norm", "swiglu", "qk_norm_rope"), ELEMENTWISE),
    "sample": SAMPLING,
}
"""A norm before a matrix product counts apart where it is a kernel of its own, and as linear where the two are one."""


def phase(plan: StepPlan) -> str:
    """`prefill`, `decode`, `mixed`, or `recompute`: only tokens that were computed before, as in m0."""
    kinds = {chunk.kind for chunk in plan.chunks} - {"idle"}
    if "decode" in kinds:
        return "decode" if kinds == {"decode"} else "mixed"
    return "recompute" if kinds == {"recompute"} else "prefill"


def ranged(name: str, function: Callable[..., Any], around: Around) -> Callable[..., Any]:
    """The function; its calls are a named range."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with around(name):
            return function(*args, **kwargs)

    return call


def ranged_steps(submit: Callable[[StepPlan], None], around: Around) -> Callable[[StepPlan], None]:
    """The runner's `submit`; each call is a range with the step's number, phase and tokens."""
    numbers = itertools.count(1)

    def call(plan: StepPlan) -> None:
        with around(f"step {next(numbers)} {phase(plan)} {plan.num_tokens}"):
            submit(plan)

    return call


def named(thing: Any, ranges: Mapping[str, str], around: Around) -> Any:
    """A copy of it whose methods of these names are ranges, also when they call one another."""
    methods = {method: ranged(name, getattr(type(thing), method), around) for method, name in ranges.items()}
    twin = copy(thing)
    twin.__class__ = type(type(thing).__name__, (type(thing),), methods)
    return twin


@contextmanager
def replaced(thing: Any, **values: Any) -> Generator[None]:
    """Attributes of an object or a module, for a while."""
    own = vars(thing)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


@contextmanager
def named_compiled(around: Around) -> Generator[None]:
    """While it runs, Numba's functions are ranges when Python calls them; PyTorch's profiler does not know them."""
    if "numba" not in sys.modules:
        yield
        return
    from numba.core.dispatcher import Dispatcher

    modules = [module for name, module in list(sys.modules.items()) if re.match(r"(common|stages)\.", name)]
    found: dict[int, Any] = {
        id(value): value for m in modules for value in vars(m).values() if isinstance(value, Dispatcher)
    }
    kinds = {id: type(function) for id, function in found.items()}
    for id_, function in found.items():
        call = ranged(COMPILED + function.__name__, kinds[id_].__call__, around)
        function.__class__ = type(kinds[id_].__name__, (kinds[id_],), {"__call__": call})
    try:
        yield
    finally:
        for id_, function in found.items():
            function.__class__ = kinds[id_]


@contextmanager
def named_parts(engine: Engine, around: Around = record_function) -> Generator[None]:
    """While it runs, steps and their parts show up in profiles under their names."""
    run, attention, scheduler = engine.runner, engine.runner.attention, engine.scheduler
    twin = named(run.model, {"__call__": ELEMENTWISE}, around)
    twin.ops = named(run.model.ops, OPS, around)
    attends = {name: attend for name in ATTENDS if (attend := getattr(attention, name, None)) is not None}
    with ExitStack() as stack:
        stack.enter_context(named_compiled(around))
        stack.enter_context(replaced(runner, sample=ranged(SAMPLING, runner.sample, around)))
        stack.enter_context(
            replaced(attention, **{name: ranged(ATTENTION, attend, around) for name, attend in attends.items()})
        )
        stack.enter_context(
            replaced(
                scheduler,
                plan=ranged("plan", scheduler.plan, around),
                update=ranged("update", scheduler.update, around),
            )
        )
        submit, collect = ranged_steps(run.submit, around), ranged("wait", run.collect, around)
        stack.enter_context(replaced(run, model=twin, submit=submit, collect=collect))
        yield
