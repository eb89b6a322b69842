"""The order in which requests may start."""

from __future__ import annotations

import random

import pytest

from common import SamplingParams
from common.queue import AGEING_SECONDS, WaitingQueue
from common.request import Request


def request(number: int, priority: int = 0, arrival: float = 0.0) -> Request:
    return Request(f"r{number}", [1], SamplingParams(), frozenset(), 0, arrival, number=number, priority=priority)


def filled(policy: str, *requests: Request) -> WaitingQueue:
    queue = WaitingQueue(policy)
    for one in requests:
        queue.append(one)
    return queue


def test_fcfs_ignores_priority_and_the_claimed_arrival() -> None:
    queue = filled("fcfs", request(0, 5, 9.0), request(1, -5, 3.0), request(2, 0, 0.0))
    assert [r.number for r in queue] == [0, 1, 2]


def test_a_lower_number_is_more_urgent() -> None:
    queue = filled("priority", request(0, 1), request(1, -1), request(2, 0), request(3, -2))
    assert [r.number for r in queue] == [3, 1, 2, 0]


def test_requests_of_equal_urgency_keep_their_order() -> None:
    """Must not change places."""
    queue = filled("priority", *(request(n, 1, 7.0) for n in range(20)))
    assert [r.number for r in queue] == list(range(20))


@pytest.mark.parametrize(("waited", "first"), [(-0.01, 1), (0.01, 0)])
@pytest.mark.parametrize("levels", [1, 2, 50])
def test_a_request_that_waits_long_enough_starts_first(levels: int, waited: float, first: int) -> None:
    """Ten seconds of waiting are worth one level, neither more nor less. A patient request must not starve."""
    patient = request(0, levels, 100.0)
    urgent = request(1, 0, 100.0 + levels * AGEING_SECONDS + waited)
    assert filled("priority", patient, urgent)[0].number == first


def test_an_endless_stream_of_urgent_requests_starves_no_other_one() -> None:
    queue = filled("priority", request(0, 3, 0.0))
    for number in range(1, 100):  # one a second, each of the highest level, and one starts each second
        queue.append(request(number, 0, float(number)))
        first = queue[0]
        queue.remove(first)
        if first.number == 0:
            assert number == 30
            return
    pytest.fail("starved")


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_preempted_request_keeps_its_place(policy: str) -> None:
    shuffled = random.Random(0)
    requests = [request(n, shuffled.randrange(-3, 3), shuffled.uniform(0, 50)) for n in range(30)]
    queue = filled(policy, *requests)
    order = list(queue)
    for _ in range(50):
        leaving = shuffled.sample(requests, 5)
        for one in leaving:
            queue.remove(one)
        assert list(queue) == [r for r in order if r not in leaving] and len(queue) == 25
        for one in leaving:
            queue.append(one)
        assert list(queue) == order


def test_removing_a_request_that_does_not_wait_is_refused() -> None:
    """Must not remove another request."""
    queue = filled("fcfs", request(0), request(2))
    for absent in (request(1), request(2), request(3)):
        with pytest.raises(RuntimeError, match="does not wait here"):
            queue.remove(absent)
    assert [r.number for r in queue] == [0, 2]
