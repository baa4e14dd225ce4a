"""Writing files: whole or not at all, and as JSON."""

import contextlib
import math
import os
from pathlib import Path

from core.errors import InputError


def check_writable(folder):
    """Make a folder; InputError where files cannot be written into it, before work is done for them."""
    with atomic_write(Path(folder) / '.writable', sync=False):
        pass
    (Path(folder) / '.writable').unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path, mode='w', sync=True, keep=None):
    """Open a file beside `path` for writing and rename it to `path` once it is complete and on disk.

    Args:
        path (str or Path): the file to make or replace; its folder is made.
        mode (str): 'w' or 'wb'.
        sync (bool): outlast a power cut too; thousands of small files that can be made again go without.
        keep (str or Path, optional): the name that a file which is replaced gets, in the same folder.

    Yields:
        file object. When the body raises, `path` stays as it was.

    Raises:
        InputError: the folder cannot be written to.
    """
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(beside, mode)  # noqa: SIM115 (closed below, where errors mean something else)
    except OSError as error:
        raise InputError(f'cannot write {path}: {error.strerror}. Choose a folder that can be written to.') from error
    try:
        with file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(beside, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the names too
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def json_ready(value):
    """A number or nested dict of numbers and strings as JSON can hold it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
