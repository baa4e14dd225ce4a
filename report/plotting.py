"""matplotlib for pictures that go to files."""

import os
from pathlib import Path

from core.files import atomic_write
from core.names import printable

# Notebooks and IDEs choose a backend for their own processes by this variable, and commands started there inherit it.
# Where that backend is not installed, importing matplotlib would fail. A file needs no backend.
_chosen = os.environ.pop('MPLBACKEND', None)
try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
finally:
    if _chosen is not None:
        os.environ['MPLBACKEND'] = _chosen

__all__ = ['Figure', 'Patch', 'colormaps', 'plain_text', 'save_figure']

DPI = 100


def plain_text(text: str) -> str:
    """A name as matplotlib shows it: dollar signs start no formula, and bytes that are no UTF-8 are escaped."""
    return printable(text).replace('$', r'\$')


def save_figure(path: Path, figure: Figure):
    """Write a figure in the format of the file's suffix."""
    with atomic_write(path, 'wb', sync=False) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=DPI)
