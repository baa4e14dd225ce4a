"""Write files completely or not at all; prepare values for JSON."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.errors import InputError


def check_writable(folder: str | Path):
    """Make a folder. Raises InputError if it is not writable. To be called before any work starts."""
    with atomic_write(Path(folder) / '.writable', sync=False):
        pass
    (Path(folder) / '.writable').unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(
    path: str | Path, mode: str = 'w', sync: bool = True, keep: str | Path | None = None
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing, and rename it to `path` once it is complete.

    Args:
        path: the file to make or replace; its folder is made.
        mode: 'w' or 'wb'.
        sync: force the content to disk before the rename, so that it survives a power failure. Not needed for
            files that can be regenerated.
        keep: new path, in the same folder, for a file that is replaced.

    Yields:
        The file object. If the body raises an exception, `path` stays as it was.

    Raises:
        InputError: the folder cannot be written to.
    """
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(beside, mode)  # noqa: SIM115 (closed below; an OSError there has another cause)
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
            os.fsync(folder)  # the renames
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def json_ready(value: Any) -> Any:
    """Make a number, or a nested dict of numbers and strings, fit for JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
