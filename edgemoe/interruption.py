"""Whether someone asked the command to end, also where Python forgot it.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor or a callback of a
weak reference it is printed and ignored, and the command would go on and publish what nobody
wants. While a pool starts a thread it leaves one behind that nobody knows of, and Python would
wait for it for ever at the end: there it comes a moment later.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_asked = threading.Event()
_STARTING = {
    getattr(function, "__code__", None)
    for function in (
        threading.Thread.start,
        getattr(ThreadPoolExecutor, "_adjust_thread_count", None),
    )
}
_CAN_WAIT = hasattr(signal, "setitimer")  # not on Windows
_MOMENT = 0.02  # seconds


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End a block on SIGTERM as on Ctrl-C, and remember both.

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
    if _CAN_WAIT:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _interrupt)
    try:
        yield
    finally:
        if _CAN_WAIT and _asked.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0)
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


def _interrupt(_: int, frame: FrameType | None) -> None:
    _asked.set()
    if _starts_a_thread(frame):
        signal.setitimer(signal.ITIMER_REAL, _MOMENT)
        return
    raise KeyboardInterrupt


def _starts_a_thread(frame: FrameType | None) -> bool:
    while frame is not None and _CAN_WAIT:
        if frame.f_code in _STARTING:
            return True
        frame = frame.f_back
    return False
