"""Whether someone asked the command to end, also where Python forgot it.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor or a callback of a
weak reference it is printed and ignored, and the command would go on and publish what nobody
wants.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_asked = threading.Event()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does, and remember both.

    Only in the main thread; and Ctrl-C only where it is not ignored, as it is by what a shell
    starts in the background.

    Yields:
        Nothing. When the block ends signals are handled as before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def end_if_asked() -> None:
    """Interrupt where an interruption was ignored.

    Raises:
        KeyboardInterrupt: Someone asked.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    _asked.set()
    raise KeyboardInterrupt
