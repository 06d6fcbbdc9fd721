"""Prefetching: a function is applied to items in a thread pool, and results come in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["prefetch"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """Apply a function to items in a thread pool; results come in the order of the items.

    Threads are sufficient, since decoding images and reading files release the GIL, and nothing has to be pickled.
    Items are drawn one by one as there is room, so they may be endless. Closing the iterator, or leaving it to the
    garbage collector, cancels calls that have not begun and waits for the others.

    Args:
        function: Called with one item, in several threads at once.
        items: Drawn by the thread that iterates.
        workers: Number of threads, at least 1.
        ahead: Largest number of items that are begun or done and not yet yielded, at least 1. If it is less than
            `workers`, some threads are idle.

    Yields:
        (item, result), or (item, exception) if the function raised one; the iteration continues.
    """
    if workers < 1 or ahead < 1:
        raise ValueError(f"workers and ahead must be at least 1, got {workers} and {ahead}")
    return _prefetch(function, items, workers, ahead)


def _prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[tuple[Item, Any]]:
    pending: deque[tuple[Item, Future[Result]]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        more = True
        while more or pending:
            while more and len(pending) < ahead:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                else:
                    pending.append((item, pool.submit(function, item)))
            if pending:
                item, future = pending.popleft()
                raised = future.exception()  # waits
                if raised is not None and not isinstance(raised, Exception):
                    raise raised  # KeyboardInterrupt, SystemExit
                yield item, future.result() if raised is None else raised
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
