"""Reads of files that may hang, as those of a network file system do: in a thread, which is given up in time.

Knows no checkpoints.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from core.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")
LOOK_SECONDS = 10.0  # to follow a link or list a folder


class FileThread:
    """Makes one call at a time, each in a thread of its own, so that the event loop stays free. Used from that only.

    A thread that hangs cannot be stopped. Until it ends by itself every further call is refused, so that no threads,
    and no half-loaded models, pile up.
    """

    def __init__(self) -> None:
        self._free = asyncio.Lock()
        self._left = False  # whether a call was given up and is not over

    async def run(
        self, label: str, seconds: float | None, call: Callable[P, T], *args: P.args, **values: P.kwargs
    ) -> T:
        """What `call` returns. Raises what it raises, and CheckpointError where `seconds` are not enough for it.

        label   what is read, for the message
        seconds None: however long it takes
        """
        async with self._free:
            if self._left:
                raise CheckpointError(
                    f"{label}: not read, as an earlier read was given up and is not over: try again later"
                )
            outcome: Future[T] = Future()

            def work() -> None:
                try:
                    outcome.set_result(call(*args, **values))
                except BaseException as error:
                    outcome.set_exception(error)

            # A daemon: neither the end of the process nor that of the event loop waits for it.
            threading.Thread(target=work, name="files", daemon=True).start()
            waiting = asyncio.wrap_future(outcome)
            self._left = True
            waiting.add_done_callback(self._over)
            await asyncio.wait((waiting,), timeout=seconds)
            if not waiting.done():
                raise CheckpointError(f"{label}: its files did not come within {seconds:g} seconds, and are given up")
            return waiting.result()

    def _over(self, waiting: "asyncio.Future[T]") -> None:
        self._left = False
        if not waiting.cancelled():
            waiting.exception()  # of one that was given up nobody else takes note
