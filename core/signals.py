"""SIGTERM and SIGINT ask a run to save its state and stop. A signal is remembered here until the run asks for it."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Sequence

NUMBERS = (signal.SIGINT, signal.SIGTERM)
_received = 0


class Stopped(Exception):
    """The run has saved its state and ends because of a signal.

    Args:
        number: of the signal; the exit code is 128 + number.
    """

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.exit_code = 128 + number


def listen(tell: bool = True):
    """Remember SIGTERM and SIGINT instead of ending at once; a second SIGINT raises KeyboardInterrupt.

    Args:
        tell: say at a SIGINT that it was noticed: someone waits at a terminal.
    """
    for number in NUMBERS:
        signal.signal(number, functools.partial(_remember, tell))


def received() -> tuple[int, ...]:
    """One number per signal of NUMBERS: 1 if it arrived, else 0. Processes add these up to agree on a stop."""
    return tuple(int(_received == number) for number in NUMBERS)


def raise_if_received(counts: Sequence[int] | None = None):
    """Raise Stopped if a signal arrived.

    Args:
        counts: sum of `received` over all processes; by default that of this process.
    """
    counts = received() if counts is None else counts
    if any(counts):
        raise Stopped(NUMBERS[max(range(len(NUMBERS)), key=lambda i: counts[i])])


def ignore(_worker: int | None = None):
    """Make a loader worker ignore the signals, which reach the whole process group; its training process decides."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill loader workers that an error left running: they ignore the SIGTERM with which Python would end them."""
    workers = multiprocessing.active_children()
    if workers:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when a worker is killed
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        signal.signal(signal.SIGCHLD, handler)


def _remember(tell, number, _frame):
    global _received
    if _received == number == signal.SIGINT:
        raise KeyboardInterrupt
    _received = number
    if number == signal.SIGINT and tell:
        os.write(2, b'\nstopping soon; press Ctrl-C again to stop at once\n')
