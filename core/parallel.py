"""A map over processes with a progress bar."""

import os
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm


def usable_cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def parallel_map(function, items, title, workers=None):
    """Apply a function to every item in several processes; results come in the items' order, whatever their number.

    Args:
        function (callable): of one item; importable, as processes are started with it.
        items (list): what to work on.
        title (str): of the progress bar.
        workers (int, optional): processes; the usable cores by default. 1 stays in this process.

    Returns:
        list: results. An exception of the function ends the map and is raised here.
    """
    workers = min(workers or usable_cores(), max(len(items), 1))
    bar = tqdm(total=len(items), desc=title, leave=False, disable=None)
    with bar:
        if workers == 1:
            return [_tick(bar, function(item)) for item in items]
        pool = ProcessPoolExecutor(workers)
        try:
            chunk = min(64, -(-len(items) // (4 * workers)))
            return [_tick(bar, result) for result in pool.map(function, items, chunksize=chunk)]
        finally:  # on an error or Ctrl-C the rest is not worked off first
            pool.shutdown(cancel_futures=True)


def _tick(bar, result):
    bar.update()
    return result
