"""The byte-bounded dictionary: never over its limit, not even while an entry is made; least recently used out first."""

import threading
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.byte_lru import ByteLRU

USES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40), st.booleans()), max_size=60)


@given(uses=USES, limit=st.integers(0, 100))
def test_it_never_holds_more_than_its_limit_and_drops_the_least_recently_used(
    uses: list[tuple[int, int, bool]], limit: int
) -> None:
    cache: ByteLRU[int, int] = ByteLRU(limit)
    model: dict[int, int] = {}  # sizes, least recently used first
    hits = misses = evictions = 0
    for key, size, reads in uses:
        if reads:
            value = cache.get(key)
            assert value == (key if key in model else None)
            hits, misses = hits + (key in model), misses + (key not in model)
            if key in model:
                model[key] = model.pop(key)
            continue
        held: list[int] = []

        def make(key: int = key, held: list[int] = held, size: int = size) -> int:
            held.append(cache.bytes)
            return key

        kept = cache.put(key, size, make)
        assert (kept is not None) == (key not in model and size <= limit)
        if kept is not None:
            while sum(model.values()) + size > limit:
                del model[next(iter(model))]
                evictions += 1
            model[key] = size
            assert held == [sum(model.values())]  # room was made before the value was
    assert cache.bytes == sum(model.values()) <= limit
    assert {key for key in range(7) if key in cache} == set(model)
    assert (cache.counts.hits, cache.counts.misses, cache.counts.evictions) == (hits, misses, evictions)


def test_what_fails_to_be_made_leaves_nothing() -> None:
    cache: ByteLRU[str, int] = ByteLRU(10)

    def fail() -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.put("a", 10, fail)
    assert (cache.bytes, len(cache)) == (0, 0)
    assert cache.put("b", 10, lambda: 1) == 1


def test_what_is_made_elsewhere_counts_already() -> None:
    cache: ByteLRU[str, int] = ByteLRU(10)
    inside, leave = threading.Event(), threading.Event()

    def slow() -> int:
        inside.set()
        assert leave.wait(10)
        return 1

    thread = threading.Thread(target=lambda: cache.put("slow", 8, slow))
    thread.start()
    assert inside.wait(10)
    assert cache.put("late", 4, lambda: 2) is None
    assert cache.put("small", 2, lambda: 3) == 3
    leave.set()
    thread.join()
    assert cache.get("slow") == 1
    assert cache.bytes == 10


def test_what_cannot_be_kept_drops_nothing() -> None:
    cache: ByteLRU[str, int] = ByteLRU(10)
    cache.put("old", 3, lambda: 1)

    def make() -> int:
        assert cache.put("late", 5, lambda: 2) is None  # beside 6 that are being made
        return 3

    assert cache.put("new", 6, make) == 3
    assert (cache.get("old"), cache.counts.evictions, cache.bytes) == (1, 0, 9)


def test_the_same_made_twice_at_once_is_counted_once() -> None:
    cache: ByteLRU[str, int] = ByteLRU(100)
    kept = cache.put("a", 10, lambda: cache.put("a", 10, lambda: 1) or 0)
    assert kept is None
    assert (cache.get("a"), cache.bytes) == (1, 10)


def test_discarded_entries_give_their_bytes_back() -> None:
    cache: ByteLRU[tuple[str, int], int] = ByteLRU(100)
    for version in "ab":
        for number in range(3):
            cache.put((version, number), 10, partial(int, number))
    cache.discard(lambda key: key[0] == "a")
    assert (cache.bytes, len(cache), cache.counts.evictions) == (30, 3, 0)
