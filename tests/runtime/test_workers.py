"""Work in order by a pool."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bingo.runtime.workers import in_order


@pytest.mark.parametrize(("items", "ahead"), [(0, 3), (2, 3), (40, 1), (40, 7)])
def test_results_are_in_order_and_few_wait_for_their_reader(items, ahead):
    begun, read = [], 0
    first_may_end = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0 and items > 1:
            assert first_may_end.wait(60)  # the first ends after the second
        if item == 1:
            first_may_end.set()
        return item * item

    with ThreadPoolExecutor(2) as pool:
        for result in in_order(pool, work, range(items), ahead):
            assert result == read * read
            assert len(begun) <= read + ahead + 1
            read += 1
    assert (read, sorted(begun)) == (items, list(range(items)))
