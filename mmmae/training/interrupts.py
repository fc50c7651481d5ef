"""Ctrl-C while Lightning trains."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Raise KeyboardInterrupt where Lightning exits after Ctrl-C or SIGTERM, and let the next Ctrl-C count again.

    Lightning ignores Ctrl-C while it shuts down, and from then on: a notebook could not be interrupted any more.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if handler is not None and signal.getsignal(signal.SIGINT) != handler:
            signal.signal(signal.SIGINT, handler)
