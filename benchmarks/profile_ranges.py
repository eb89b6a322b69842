"""Names for what a step does, while it is looked at: ranges of PyTorch's profiler, or NVTX ranges for Nsight Systems.

`step 12 decode 64` is the 12th step, of that phase and of 64 tokens: what the runner launches for it. `step` around it
is the engine's whole step, with `plan`, `wait` and `update`. The engine holds none of this: off, it costs nothing.
"""

import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

from torch.profiler import record_function

from benchmarks.measure import ATTENDS
from benchmarks.profile_parts import ATTENTION, COMMUNICATION, COMPILED, ELEMENTWISE, LINEAR, SAMPLING
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

    if hasattr(function, "__self__"):  # fused operations read the owner of the method
        vars(call)["__self__"] = function.__self__
    return call


def ranged_type(kind: type, ranges: Mapping[str, str], around: Around) -> type:
    """The class with these methods as ranges, also when they call one another."""
    methods = {method: ranged(name, getattr(kind, method), around) for method, name in ranges.items()}
    return type(kind.__name__, (kind,), methods)


def compiled_functions() -> list[Any]:
    """Numba's functions in our modules; PyTorch's profiler does not know them."""
    if "numba" not in sys.modules:
        return []
    from numba.core.dispatcher import Dispatcher

    ours = [module for name, module in list(sys.modules.items()) if name.startswith(("common.", "stages."))]
    found = {id(value): value for module in ours for value in vars(module).values() if isinstance(value, Dispatcher)}
    return list(found.values())


@contextmanager
def named_parts(engine: Engine, around: Around = record_function) -> Generator[Counter[str]]:
    """While it runs, steps and their parts show up in profiles under their names. Gives the steps so far, by phase."""
    run, attention, scheduler, seen = engine.runner, engine.runner.attention, engine.scheduler, Counter[str]()
    launch, compiled = run.submit, compiled_functions()

    def submit(plan: StepPlan) -> None:
        seen[phase(plan)] += 1
        with around(f"step {seen.total()} {phase(plan)} {plan.num_tokens}"):
            launch(plan)

    model, ops = copy(run.model), copy(run.model.ops)
    model.__class__ = ranged_type(type(model), {"__call__": ELEMENTWISE}, around)
    model.ops, ops.__class__ = ops, ranged_type(type(ops), OPS, around)
    attends = {name: attend for name in ATTENDS if (attend := getattr(attention, name, None)) is not None}
    replaced: list[tuple[object, dict[str, Any]]] = [
        (runner, {"sample": ranged(SAMPLING, runner.sample, around)}),
        (attention, {name: ranged(ATTENTION, attend, around) for name, attend in attends.items()}),
        (scheduler, {name: ranged(name, getattr(scheduler, name), around) for name in ("plan", "update")}),
        (run, {"model": model, "submit": submit, "collect": ranged("wait", run.collect, around)}),
    ]
    if (ranks := engine.config.ranks) is not None:
        meets = {name: ranged(COMMUNICATION, getattr(ranks, name), around) for name in ("sum", "gather")}
        replaced.append((ranks, meets))
    with ExitStack() as stack:
        for thing, new in replaced:
            stack.enter_context(patch.multiple(thing, **new))
        for function in compiled:
            stack.callback(setattr, function, "__class__", type(function))
            function.__class__ = ranged_type(type(function), {"__call__": COMPILED + function.__name__}, around)
        yield seen
