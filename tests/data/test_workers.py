"""Work spread over processes: results in order, errors where they belong."""

import math
import os
import random
import time

import pytest

from arriero.data.workers import in_order
from arriero.errors import DataError


def slowly(x: int) -> int:
    """A square, sooner or later."""
    time.sleep(random.Random(x).random() / 50)
    return x * x


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_work(workers):
    assert list(in_order(slowly, iter(range(29)), workers, "squaring")) == [(x, x * x) for x in range(29)]


def test_what_a_worker_raises_is_raised_at_its_item():
    done = []
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        for item, _ in in_order(math.sqrt, iter([1.0, 4.0, -1.0, 9.0]), 2, "rooting"):
            done.append(item)
    assert done == [1.0, 4.0]


def test_a_worker_that_dies_is_told_with_the_remedy():
    with pytest.raises(DataError, match=r"one of 2 dying processes died: out of memory, .*or set workers to 1"):
        list(in_order(os._exit, iter([3, 5]), 2, "dying"))
