"""SIGTERM and SIGINT ask a run to save and stop; what it was asked is remembered here until it looks."""

import multiprocessing
import signal

NUMBERS = (signal.SIGINT, signal.SIGTERM)
_asked = 0


class Stopped(Exception):
    """The run has saved its state and ends because of a signal.

    Args:
        number (int): of the signal; the exit code is 128 more.
    """

    def __init__(self, number):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.exit_code = 128 + number


def listen():
    """Remember SIGTERM and SIGINT rather than die of them; a second SIGINT interrupts at once."""
    for number in NUMBERS:
        signal.signal(number, _remember)


def asked():
    """The number of the signal that arrived, 0 before one has."""
    return _asked


def flags():
    """1 for the signal that arrived, 0 for the others, in the order of NUMBERS: what processes can add up."""
    return tuple(int(_asked == number) for number in NUMBERS)


def stop(counts):
    """The Stopped that the added-up flags of all processes mean."""
    return Stopped(NUMBERS[max(range(len(NUMBERS)), key=lambda i: counts[i])])


def ignore(_worker=None):
    """Leave signals to the training process: for loader workers, which Ctrl-C or a scheduler reaches too."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """End loader workers that an error left behind: they ignore the SIGTERM that Python would end them with."""
    workers = multiprocessing.active_children()
    if workers:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a worker is killed
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        signal.signal(signal.SIGCHLD, handler)


def _remember(number, _frame):
    global _asked
    if _asked == number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked = number
