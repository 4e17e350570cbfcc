"""Ctrl-C and SIGTERM: a step that is being made is finished and saved first; a second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that whatever cleans up after one does after the other."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise on SIGTERM as Ctrl-C would, in the main thread (elsewhere Python can't)."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


@contextmanager
def finish_step() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only makes the yielded function answer True; leaving then delivers it.

    The second does at once what the first would have done outside. Ignored signals stay ignored.
    """
    asked: list[int] = []
    previous = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: object) -> None:
        if asked:
            restore()
            signal.raise_signal(number)
            return
        asked.append(number)
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nposttrain: finishing and saving this step; a second signal leaves at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    for number in previous:
        signal.signal(number, remember)
    try:
        yield lambda: bool(asked)
    finally:
        restore()
    if asked:
        signal.raise_signal(asked[0])
