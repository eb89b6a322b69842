"""How an exercise is checked: the verdict is right, or says what is wrong."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import stages
from common import Engine, SamplingParams

T = TypeVar("T")


def tiny(stage: str, **options: Any) -> Engine:
    """A stage on a small random model, in float32."""
    options = {"max_model_len": 128} | options
    return stages.build(stage, model="random:tiny-llama", device="cpu", dtype="float32", **options)


def outputs_of(counts: Sequence[int]) -> list[SamplingParams]:
    """Parameters of requests, each with its number of output tokens."""
    return [SamplingParams(max_tokens=count, ignore_eos=True) for count in counts]


@dataclass(frozen=True)
class Verdict:
    """What a notebook shows as the result of an exercise's cell."""

    right: bool
    message: str

    def _repr_markdown_(self) -> str:
        return f"**{'Right.' if self.right else 'Not yet.'}** {self.message}"

    def __repr__(self) -> str:
        return self._repr_markdown_().replace("**", "", 2)


class NotYetError(Exception):
    """An answer is wrong; the message says why."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise NotYetError(message)


def answered(got: T | None, case: str | None = None) -> T:
    """What an answer returned; None means a missing `return`. case: what was asked, in words."""
    if got is None:
        raise NotYetError(f"{'Your' if case is None else f'{case}: your'} answer is None. Is there a `return`?")
    return got


def expect_equal(got: Any, wanted: Any, case: str, hint: str = "", form: str = "") -> None:
    """case: what was asked, in words. hint: said after both values. form: how they are written, as in an f-string.
    A float may be off by a thousandth: answers may be rounded."""
    answered(got, case)
    equal = math.isclose(got, wanted, rel_tol=1e-3, abs_tol=1e-9) if isinstance(wanted, float) else got == wanted
    said, right = (format(value, form) if form else repr(value) for value in (got, wanted))
    expect(equal, f"{case}: you say {said}, and it is {right}. {hint}".rstrip())


def expect_tensor(got: object, shape: Sequence[int], hint: str = "") -> None:
    """hint: said after a wrong shape."""
    answered(got)
    if not isinstance(got, torch.Tensor):
        raise NotYetError(f"Your answer is {type(got).__name__}, not a tensor {list(shape)}.")
    found = list(got.shape)
    expect(found == list(shape), f"Your answer has the shape {found}, and it is {list(shape)}. {hint}".rstrip())


def check(judge: Callable[[Any], str]) -> Callable[[Any], Verdict]:
    """A check from a judge, which takes the answer and returns what to say about a right one, and calls `expect` for a
    wrong one. An answer that raises gives a verdict too, not a traceback through our code."""

    @functools.wraps(judge)
    def verdict(answer: Any) -> Verdict:
        try:
            return Verdict(True, judge(answer))
        except NotYetError as error:
            return Verdict(False, str(error))
        except NotImplementedError:
            return Verdict(False, "There is nothing to check: your code goes where `NotImplementedError` is raised.")
        except Exception as error:  # whatever a learner's code does
            return Verdict(False, f"Your code broke with {type(error).__name__}: {error}")

    return verdict
