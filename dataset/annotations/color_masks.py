"""Read masks whose colours tell the classes, and the table of names and colours, as CVAT exports them.

labelmap.txt has a line for each class, 'name:red,green,blue:parts:actions'; lines that begin with '#' are comments.
"""

import re
from pathlib import Path

import numpy as np

from core.errors import InputError, some
from core.names import canonical
from dataset.masks import open_png, places_of_colors

TABLE = 'labelmap.txt'
LINE = re.compile(r'(?P<name>.+?)\s*:\s*(?P<color>\d+\s*,\s*\d+\s*,\s*\d+)\s*(:.*)?')
EXPECTED = 'expected name:red,green,blue:: with numbers 0..255, as in car:61,61,245::'


def read_color_table(path: Path) -> dict[str, tuple[int, int, int]]:
    """Name -> RGB colour, in the order of a table. Raises InputError with the line that is wrong."""
    try:
        lines = path.read_text('utf-8-sig').splitlines()
    except FileNotFoundError:
        raise InputError(f'{path} does not exist; expected a table of names and colours: {EXPECTED}') from None
    except (OSError, ValueError) as error:
        raise InputError(f'{path} cannot be read ({error}); expected a UTF-8 text of names and colours') from None
    table, first = {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith('#'):
            continue
        match = LINE.fullmatch(line.strip())
        color = tuple(map(int, match['color'].split(','))) if match else ()
        if not match or max(color) > 255:
            raise InputError(f'{path}, line {number}: got {line.strip()!r}; {EXPECTED}')
        name = canonical(match['name'])
        for what, value in (('name', name), ('colour', color)):
            if (other := first.setdefault(value, number)) != number:
                raise InputError(
                    f'{path}, line {number}: line {other} has the same {what}, {value!r}; they must differ'
                )
        table[name] = color
    if not table:
        raise InputError(f'{path} holds no class; {EXPECTED}')
    return table


def read_color_names(path: Path, table: dict[str, tuple[int, int, int]]) -> tuple[np.ndarray, list[str]]:
    """Read a mask by its colours; transparency is ignored, and shades of grey are colours too.

    Args:
        path: a PNG file.
        table: name -> RGB colour.

    Returns:
        Places in the list of names, int64 [H, W]; the names of the mask's colours.

    Raises:
        InputError: as `masks.open_png`; or a colour is not in the table.
    """
    places, colors = places_of_colors(*open_png(path))
    codes = [color and tuple(color) for color in colors]
    names = {color: name for name, color in table.items()}
    if unknown := [i for i, code in enumerate(codes) if code not in names]:
        y, x = np.argwhere(places == unknown[0])[0].tolist()
        count = np.isin(places, unknown).sum()
        raise InputError(
            f'{path} has the colour {codes[unknown[0]]} at x = {x}, y = {y}, which is not in the table of colours '
            f'({some(f"{name} {color}" for name, color in table.items())}). Pixels of unknown colours: {count}, of '
            f'{len(unknown)} colours. Add them to the table; if there are many along borders, a tool has resized or '
            'smoothed the mask: export it again.'
        )
    return places, [names[code] for code in codes]
