"""Write files completely or not at all; prepare values for JSON; recognise files that are not the wanted ones."""

import contextlib
import errno
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from core.errors import InputError

# of text files that may name files, whose names may be no UTF-8
TEXT = {'encoding': 'utf-8', 'errors': 'surrogateescape'}


OTHER_FILES = (  # how files begin that copies and downloads leave in place of what was wanted
    (rb'version https://git-lfs', 'a pointer of Git LFS, not the file itself. Run: git lfs pull'),
    (rb'.{,200}/annex/objects/', 'a pointer of git-annex, not the file itself. Run: git annex get'),
    (rb'(?i)\s*<(!doctype html|html|head)', 'a web page, as failed downloads leave it. Download the file again'),
    (rb'(?i)\s*(<\?xml|\{)', 'XML or JSON text, as failed downloads leave it. Download the file again'),
    (rb'\0\0\0\0\0\0\0\0', 'empty inside: it begins with zeros, as after a crash or a full disk. Copy it again'),
)


def what_begins_so(start: bytes, others: Iterable[tuple[bytes, str]] = ()) -> str | None:
    """What a file is that is not the wanted one, by its first bytes; None where they do not say.

    Args:
        start: at least 512 bytes, or the whole file.
        others: patterns of what else is found in place of such files, and what it is, tried first.
    """
    return next((what for begin, what in (*others, *OTHER_FILES) if re.match(begin, start[:512], re.DOTALL)), None)


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
        mode: 'w' or 'wb'. Text is written as UTF-8, and names that are none (`names`) with their bytes on disk.
        sync: force the content to disk before the rename, so that it survives a power failure. Not needed for
            files that can be regenerated.
        keep: new path, in the same folder, for a file that is replaced.

    Yields:
        The file object. If the body raises an exception, `path` stays as it was.

    Raises:
        InputError: the folder cannot be written to, or the name is too long.
    """
    path, name = Path(path), os.fsencode(Path(path).name)
    # a name may have the greatest length that the disk allows
    beside = path.with_name(f'.{path.name if len(name) < 200 else zlib.crc32(name)}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
        file = open(beside, mode, **({} if 'b' in mode else TEXT))  # noqa: SIM115 (closed below; an OSError there has another cause)
    except OSError as error:
        what = 'shorter name' if error.errno == errno.ENAMETOOLONG else 'folder that can be written to'
        raise InputError(f'cannot write {path}: {error.strerror}. Choose a {what}.') from error
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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not tell it
        raise
    finally:
        beside.unlink(missing_ok=True)


def parse_json(text: bytes, path: str | Path) -> dict:
    """The JSON object in a text. Raises InputError, which names the file that the text is from."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise InputError(f'{path} is damaged: expected a JSON object, found {str(content)[:40]}')
    return content


def json_ready(value: Any) -> Any:
    """Make a number, or a nested dict of numbers and strings, fit for JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
