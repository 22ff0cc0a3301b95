"""A policy is used by one thread at a time: whoever comes second is refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def one_caller(alone: threading.Lock) -> Iterator[None]:
    """Holds the lock within; ``RuntimeError`` if another thread has it."""
    if not alone.acquire(blocking=False):
        raise RuntimeError(
            "policy is busy: it is running in another thread; a policy is used by one thread "
            "at a time"
        )
    try:
        yield
    finally:
        alone.release()
