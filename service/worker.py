"""The one thread of a device that runs models. Knows lanes and commands, neither requests nor HTTP."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from service.jobs import Job, Outbox
from service.lane import Lane

log = logging.getLogger(__name__)


class Worker:
    """Runs every lane in turn while there is work and sleeps while there is none.

    Commands (`add`, `cancel`, ...) may come from any thread and take effect between two tokens.
    """

    def __init__(self, outbox: Outbox, batch_wait_s: float) -> None:
        self.outbox = outbox
        self._batch_wait_s = batch_wait_s
        self._lanes: list[Lane] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._step_began: float | None = None
        # A daemon: a step that never returns must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread after the step that runs, waiting for it at most `timeout` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)

    def open(self, lane: Lane) -> None:
        """Start to run a lane."""
        self._send(lambda: self._lanes.append(lane))

    def close(self, lane: Lane) -> None:
        """Let go of a lane that has no jobs, and of what it keeps."""

        def remove() -> None:
            self._lanes.remove(lane)
            lane.close()

        self._send(remove)

    def add(self, lane: Lane, job: Job) -> None:
        """Give a job to its lane."""
        self._send(lambda: lane.add(job))

    def cancel(self, lane: Lane, job: Job) -> None:
        """Stop a job at the next token."""
        self._send(lambda: lane.cancel(job))

    def call(self, function: Callable[[], None]) -> None:
        """Have the worker's thread call `function`, which must not raise."""
        self._send(function)

    @property
    def alive(self) -> bool:
        """Whether the thread exists."""
        return self._thread.is_alive()

    def stalled_for(self) -> float:
        """Seconds the step that runs now has taken; 0 when idle."""
        began = self._step_began
        return time.monotonic() - began if began is not None else 0.0

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            # Nothing may end this thread but `stop`. The watchdog sees that it is gone and ends the process.
            log.critical("the worker thread dies", exc_info=True)

    def _work(self) -> None:
        while True:
            if not any(lane.jobs for lane in self._lanes):
                self._sleep()
            if self._stopping:
                return
            self._step_began = time.monotonic()
            while self._inbox:
                self._inbox.popleft()()
            for lane in self._lanes:
                if lane.jobs:
                    lane.advance()
            self.outbox.flush()
            self._step_began = None

    def _sleep(self) -> None:
        """Wait for a command, then a moment longer for company: requests that come together share a batch."""
        with self._wake:
            while not self._inbox and not self._stopping:
                self._wake.wait()
            end = time.monotonic() + self._batch_wait_s
            while not self._stopping and (left := end - time.monotonic()) > 0:
                self._wake.wait(left)
