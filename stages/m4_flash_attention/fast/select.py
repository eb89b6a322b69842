"""Which backend: the one that was asked for, or the first of the device's that can run."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from common.errors import UserError, unknown
from stages.m4_flash_attention.fast.backends import NAMES, AttentionShape, Backend


@dataclass(frozen=True, slots=True)
class Choice:
    """`reason`: one line for the user: what was chosen and why. `capturable`: a CUDA graph can repeat its steps."""

    name: str
    reason: str
    backend: Backend
    capturable: bool


def check_name(name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise unknown("attention_backend", name, ("auto", *NAMES))


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"stages.m4_flash_attention.fast.backends.{name}")


def choose(name: str, shape: AttentionShape) -> Choice:
    """`name`: `auto` or a backend's; one that cannot run is a `UserError` that names those that can."""
    if name == "auto":
        return _first_that_runs(shape)
    check_name(name)
    if reason := module_of(name).why_not(shape):
        able = [other for other in NAMES if module_of(other).why_not(shape) is None]
        hint = f"Choose from: auto, {', '.join(able)}"
        raise UserError(f"attention_backend {name!r} cannot run here: {reason}. {hint}")
    return _choice(name, shape, f"attention: {name}, as asked for")


def _first_that_runs(shape: AttentionShape) -> Choice:
    devices = {name: module_of(name).AUTO for name in NAMES}
    here = sorted((order[shape.device.type], name) for name, order in devices.items() if shape.device.type in order)
    refused: list[str] = []
    for _, name in here:
        if reason := module_of(name).why_not(shape):
            refused.append(f"not {name}: {reason}")
            continue
        why = "; ".join([module_of(name).WHY, *refused])
        return _choice(name, shape, f"attention: {name} ({why})")
    known = sorted({device for order in devices.values() for device in order}, reverse=True)
    raise UserError(f"attention_backend 'auto' knows {' and '.join(known)}, not {shape.device}: name a backend")


def _choice(name: str, shape: AttentionShape, reason: str) -> Choice:
    module = module_of(name)
    return Choice(name, reason, module.create(shape), module.CAPTURABLE)
