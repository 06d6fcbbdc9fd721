"""Apply a function to items in a thread pool, with results in the order of the items."""

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

    Decoding images and reading files release the GIL, so threads are enough and nothing is pickled. Items are drawn
    one by one as room appears, so they may be endless. Closing the iterator (or leaving it to the garbage collector)
    cancels what has not begun and waits for what has.

    Args:
        function: called with one item, in several threads at once.
        items: drawn by the thread that iterates.
        workers: threads, at least 1.
        ahead: most items that are begun or done and not yet given out, at least 1; values under `workers` idle some.

    Yields:
        (item, result), or (item, exception) where the function raised one: the iteration goes on.
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
