"""Calls that wait for storage, made ahead of their turn."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(call: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Iterator[tuple[T, Future[R]]]:
    """Each item with the future of `call(item)`, in order; at most `ahead` of them begun before their turn."""
    waiting: list[tuple[T, Future[R]]] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(call, item)))
                if len(waiting) > ahead:
                    yield waiting.pop(0)
            while waiting:
                yield waiting.pop(0)
        finally:
            for _, future in waiting:
                future.cancel()
