"""A map over processes with a progress bar."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from core.errors import InputError


def usable_cores() -> int:
    """Number of cores that this process may use, >= 1: by its affinity, and by the quota of its cgroup (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(min(cores, math.ceil(_cgroup_quota())), 1)


def _cgroup_quota(root: Path = Path('/sys/fs/cgroup')) -> float:
    """Number of cores that the cgroup's CPU quota allows; the number of cores if there is none."""
    try:
        if (root / 'cpu.max').is_file():  # version 2: "QUOTA PERIOD" or "max PERIOD"
            quota, period = (root / 'cpu.max').read_text().split()
        else:
            quota, period = ((root / 'cpu' / f'cpu.cfs_{name}_us').read_text() for name in ('quota', 'period'))
        cores = int(quota) / int(period)
    except (OSError, ValueError):
        return os.cpu_count()
    return cores if cores > 0 else os.cpu_count()


def parallel_map(function: Callable, items: Sequence, title: str, workers: int | None = None) -> list:
    """Apply a function to every item, in several processes, and show a progress bar.

    Args:
        function: takes one item; it must be importable, because other processes call it.
        items: arguments of the calls.
        title: label of the progress bar.
        workers: number of processes; default: one per usable core. With 1, this process does the work.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: the first one that the function raises. Items that no process has received yet are dropped.
        InputError: a process was killed.
    """
    workers = min(workers or usable_cores(), max(len(items), 1))
    bar = tqdm(total=len(items), desc=title, leave=False, disable=None)
    with bar:
        if workers == 1:
            return [_tick(bar, function(item)) for item in items]
        # tqdm's process_map is not used here: with chunks of several items its bar counts chunks, and it cannot make
        # its workers ignore SIGINT. Ctrl-C reaches the workers too, and an idle worker that it ends blocks the pool.
        pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        try:
            chunk = min(64, -(-len(items) // (4 * workers)))
            return [_tick(bar, result) for result in pool.map(function, items, chunksize=chunk)]
        except BrokenProcessPool as error:
            raise InputError(
                f'{title}: a worker process was killed. The system usually does that when memory runs out. End other '
                'programs, or use fewer processes (--workers, where the command has it).'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _tick(bar, result):
    bar.update()
    return result
