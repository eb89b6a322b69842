"""The exercise of long_context."""

from collections.abc import Callable

from notebooks.exercises import check, expect_equal


@check
def blocks_needed(answer: Callable[[int, int, int, int], int]) -> str:
    """answer(length, sinks, window, block_size) -> blocks of which at least one token is kept."""
    for length, sinks, window, block_size, case in (
        (160, 16, 32, 16, "the window begins and ends with a block"),
        (167, 4, 28, 16, "the window begins and ends inside blocks"),
        (20, 4, 28, 16, "everything is kept"),
        (36, 4, 28, 16, "sinks and window share a block"),
    ):
        wanted = sum(any(t < sinks or t >= length - window for t in range(first, min(first + block_size, length)))
                     for first in range(0, length, block_size))  # fmt: skip
        kept = f"{length} tokens, the first {sinks} and the last {window} kept, blocks of {block_size} ({case})"
        hint = "That many hold a token that is kept. Where does the window begin, within its block?"
        expect_equal(answer(length, sinks, window, block_size), wanted, kept, hint)
    return "However long the text gets, the number stays within one block of the same: the middle ones are released."
