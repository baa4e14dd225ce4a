"""Support images that were chosen by hand: a file with a class and an image id in each line."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from core.errors import InputError, some
from core.names import canonical
from dataset.formats import SUFFIXES
from dataset.lists import id_of, numbered_lines

FORMAT = (
    'a class, by name or id, and an image id, the name of a photograph without its folder, separated by blanks, tab '
    'or comma, e.g. "scooter,IMG_1"'
)


def read_supports(path: Path, classes: Mapping[int, str]) -> dict[int, list[str]]:
    """Read which images support which novel class.

    Args:
        path: of the file. A class has any number of images, and an image may serve several classes. Empty lines and
            lines that begin with # are left out.
        classes: novel class id -> name.

    Returns:
        Class id -> image ids, in the order of `classes`.

    Raises:
        InputError: the file cannot be read, or a line names no novel class or no image, or repeats another; or a class
            has no image.
    """
    try:
        lines = [(number, canonical(line)) for number, line in numbered_lines(path)]
    except OSError as error:
        raise InputError(f'support list {path} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise InputError(f'support list {path} is no text: {error}') from error
    names = {str(class_id): class_id for class_id in classes}
    names |= {canonical(name): class_id for class_id, name in classes.items()}
    # a name may begin with another one, and may have blanks, as an image id may
    known = '|'.join(map(re.escape, sorted(names, key=len, reverse=True)))
    entry = re.compile(rf'\s*({known})\s*[\s,]\s*(\S.*?)\s*')
    supports = {class_id: [] for class_id in classes}
    for number, line in lines:
        if line.startswith('#'):
            continue
        found = entry.fullmatch(line)
        image_id = found and _without_suffix(found[2])
        if not image_id:
            first = re.split(r'[,\t]', line)[0].strip()
            near = difflib.get_close_matches(first, names, 1) if not found and first not in names else ()
            hint = f'did you mean the class {near[0]}? Expected' if near else 'expected'
            raise InputError(
                f'support list {path}, line {number}: {line!r}; {hint} {FORMAT}. The novel classes are '
                f'{some([f"{name} ({class_id})" for class_id, name in classes.items()])}'
            )
        ids = supports[names[found[1]]]
        if image_id in ids:
            raise InputError(f'support list {path}, line {number}: {found[1]} has the image {image_id} already')
        ids.append(image_id)
    if empty := [classes[class_id] for class_id, ids in supports.items() if not ids]:
        raise InputError(f'support list {path} has no image of {some(empty)}; expected {FORMAT}')
    return supports


def _without_suffix(name):
    """The id that a name of a photograph, with or without its suffix, means; None for paths."""
    path = PurePosixPath(name)
    return id_of(path.stem if '/' not in name and path.suffix.lower() in SUFFIXES else name)
