"""What a behaviour looks like from outside: one thing is tried, and what comes out is what is expected.

The tests `test_steps.py` of the stages go from the simplest case to the next. They are the first that the starters of
`notebooks/starters` meet, so a failure says in three parts what was tried, what came out and what was expected.
"""

from __future__ import annotations

import torch


class UnexpectedError(AssertionError):
    def __init__(self, tried: str, got: str, wanted: str) -> None:
        super().__init__(f"{tried}: {got}, expected {wanted}")
        self.tried, self.got, self.wanted = tried, got, wanted


def same(tried: str, got: object, wanted: object) -> None:
    """Equal; tried: what was asked, in words."""
    if got != wanted:
        raise UnexpectedError(tried, repr(got), repr(wanted))


def close(tried: str, got: torch.Tensor, wanted: torch.Tensor | list[float], within: float = 1e-4) -> None:
    """Equal up to rounding, shapes too; shows what differs most."""
    wanted = torch.as_tensor(wanted, dtype=torch.float32)
    if got.shape != wanted.shape:
        raise UnexpectedError(tried, f"a tensor of shape {list(got.shape)}", f"shape {list(wanted.shape)}")
    if not torch.allclose(got.float(), wanted, atol=within, rtol=within):
        raise UnexpectedError(tried, shown(got), shown(wanted))


def shown(x: torch.Tensor) -> str:
    numbers = [round(number, 3) for number in x.float().flatten().tolist()]
    return f"{numbers}" if len(numbers) <= 8 else f"{numbers[:8]} ... ({len(numbers)} numbers)"
