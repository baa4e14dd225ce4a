"""Time calls against each other, each in a process of its own."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode


def measure(sides: dict[str, Callable], rounds: int, turn: float) -> dict[str, dict[str, float]]:
    """Time calls that take turns, one working while the others wait.

    Args:
        sides: name -> picklable function that makes the call to be timed.
        rounds: of turns.
        turn: seconds for which a side makes calls, at least one, when it is its turn.

    Returns:
        name -> {'s': median seconds of a call, 'mb': peak resident memory in MB, 'flop': operations of a call}.
    """
    processes = {name: Side(make) for name, make in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, process in processes.items():
            spent = 0
            while spent < turn:
                seconds[name].append(process.ask('time'))
                spent += seconds[name][-1]
    result = {}
    for name, process in processes.items():
        result[name] = {
            's': statistics.median(seconds[name]), 'mb': process.ask('memory'), 'flop': process.ask('flop')
        }  # fmt: skip
        process.end()
    return result


class Side:
    """A process that repeats one call when told to.

    Args:
        make: makes the call, in that process.
    """

    def __init__(self, make: Callable):
        context = multiprocessing.get_context('forkserver')  # inherits imports, but neither memory nor settings
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, make), daemon=True)
        self.process.start()
        far_end.close()  # so that a process that dies is noticed
        self.pipe.recv()  # warm; sides that warmed up at the same time would hinder each other

    def ask(self, what: str) -> float:
        """'time': seconds of one call; 'memory': peak resident memory so far in MB; 'flop': operations of the first."""
        self.pipe.send(what)
        return self.pipe.recv()

    def end(self):
        """End the process."""
        self.pipe.send('end')
        self.process.join()


def _serve(pipe, make):
    run = make()
    flop = operations(run)
    pipe.send('warm')
    answers = {'time': lambda: clock(run), 'memory': peak_memory, 'flop': lambda: flop}
    while (what := pipe.recv()) in answers:
        pipe.send(answers[what]())


def clock(run: Callable) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def operations(run: Callable) -> int:
    """Floating-point operations of one call, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) / 1024
