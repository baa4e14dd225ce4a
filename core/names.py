"""File names as disks hold them: companions of other systems, two Unicode forms, bytes that are no UTF-8.

Python reads bytes that are no UTF-8 as lone surrogates, which give the same bytes when the name is used again. They are
no valid text, so `printable` replaces them where text has to be valid.
"""

import functools
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

from core.errors import InputError

# '._a.jpg' and '.DS_Store' of macOS, other hidden files, lock files '~$a.doc'
COMPANIONS = ('.', '~$')


def is_companion(name: str) -> bool:
    """Whether a file is hidden or a companion that another system has put beside the files of a folder."""
    return name.startswith(COMPANIONS)


def canonical(name: str) -> str:
    """A name in Unicode's form NFC, which ids have. Disks may hold another: macOS writes a letter and its accent."""
    return unicodedata.normalize('NFC', name)


def printable(text: str) -> str:
    """Valid Unicode text: what is no UTF-8 becomes an escape such as \\udce9."""
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')


def files_by_id(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder by their ids, sorted.

    Args:
        folder: may be missing.
        suffix: e.g. '.png'.

    Returns:
        Canonical name without suffix -> path; companions and folders are left out.

    Raises:
        InputError: the names of two files differ by their Unicode form only.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(suffix) and not is_companion(e.name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {}
    for name in names:
        path = folder / name
        first = files.setdefault(canonical(path.stem), path)
        if first != path:
            raise InputError(
                f'{folder} holds {name} twice: the two names look the same, but their Unicode forms differ '
                f'({first.name!a}, {name!a}). Remove or rename one of them.'
            )
    return dict(sorted(files.items()))


def find_spelling(path: Path) -> Path:
    """The file whose name differs from that of `path` by its Unicode form at most; `path` where there is none."""
    if path.name.isascii() or os.path.exists(path):
        return path
    try:
        spellings = _spellings(path.parent, path.parent.stat().st_mtime_ns)
    except OSError:
        return path
    return path.with_name(spellings.get(canonical(path.name), path.name))


def find_by_stem(folder: Path, stem: str, suffixes: Collection[str]) -> list[str]:
    """Names of the files in a folder that have this name, in any Unicode form, and one of the suffixes, in any case.

    Args:
        folder: may be missing.
        stem: canonical name without suffix.
        suffixes: e.g. '.png', in lower case.
    """
    try:
        return _stems(folder, folder.stat().st_mtime_ns, tuple(suffixes)).get(stem, [])
    except OSError:
        return []


@functools.lru_cache(maxsize=8)
def _stems(folder, changed, suffixes):
    """Canonical stem -> names, of the files in a folder with these suffixes; `changed` is its modification time."""
    stems = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not is_companion(name):
            stems.setdefault(canonical(stem), []).append(name)
    return stems


@functools.lru_cache(maxsize=8)
def _spellings(folder, changed):
    """Canonical name -> name, of the names in a folder that are not ASCII; `changed` is its modification time."""
    return {canonical(name): name for name in os.listdir(folder) if not name.isascii()}
