"""The queue of chunks: every item once, under the budget, in turns."""

from hypothesis import given
from hypothesis import strategies as st

from service.batching import FairQueue

JOBS = st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=30), min_size=1, max_size=8)


def filled(jobs: list[list[int]]) -> FairQueue[int, int]:
    queue: FairQueue[int, int] = FairQueue()
    for job, lengths in enumerate(jobs):
        queue.add(job, range(len(lengths)), lengths)
    return queue


@given(jobs=JOBS, budget=st.integers(1, 1000))
def test_every_item_is_taken_once_and_batches_keep_the_budget(jobs: list[list[int]], budget: int) -> None:
    queue, seen = filled(jobs), []
    while batch := queue.take(budget):
        assert len(batch) == 1 or sum(picked.length for picked in batch) <= budget
        assert all(picked.length == jobs[picked.job][picked.item] for picked in batch)
        seen += [(picked.job, picked.item) for picked in batch]
    assert sorted(seen) == [(job, item) for job, lengths in enumerate(jobs) for item in range(len(lengths))]
    assert len(queue) == 0


@given(jobs=JOBS, budget=st.integers(1, 1000))
def test_no_job_waits_longer_than_a_turn_of_all(jobs: list[list[int]], budget: int) -> None:
    queue = filled(jobs)
    waited = dict.fromkeys(range(len(jobs)), 0)
    left = {job: len(lengths) for job, lengths in enumerate(jobs)}
    while batch := queue.take(budget):
        served = {picked.job for picked in batch}
        for picked in batch:
            left[picked.job] -= 1
        for job, items in left.items():
            waited[job] = 0 if job in served or not items else waited[job] + 1
            assert waited[job] < len(jobs)


def test_a_small_request_shares_the_first_batch_with_a_large_one() -> None:
    queue = filled([[100] * 200])
    queue.take(1000)
    queue.add(1, [0], [100])
    assert 1 in {picked.job for picked in queue.take(1000)}


def test_items_of_like_length_meet() -> None:
    queue = filled([[10, 100, 10, 100], [100, 10, 100, 10]])
    assert [picked.length for picked in queue.take(400)] == [100] * 4
    assert [picked.length for picked in queue.take(400)] == [10] * 4


def test_a_removed_job_is_gone() -> None:
    queue = filled([[5, 5], [5]])
    queue.remove(0)
    assert [picked.job for picked in queue.take(100)] == [1]


def test_items_that_come_later_join_those_of_their_job() -> None:
    queue = filled([[5, 9], [7]])
    queue.add(0, [2], [6])
    assert [(picked.job, picked.item) for picked in queue.take(1000)] == [(0, 1), (1, 0), (0, 2), (0, 0)]
    assert len(queue) == 0
