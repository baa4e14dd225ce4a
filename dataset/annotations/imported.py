"""What the names in annotations become: classes with values in masks, background, or ignored pixels; and the masks."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core import IGNORE_INDEX
from core.errors import InputError, some
from dataset.annotations.color_masks import read_color_names
from dataset.annotations.outlines import rasterize
from dataset.annotations.sources import Export, Source
from dataset.legend import Palette, colors_of
from dataset.spec import MAX_CLASSES

BACKGROUND = ('background', '_background_')  # names of no class, in any case
IGNORED = '__ignore__'  # of labelme


@dataclass(frozen=True)
class Classes:
    """What the names of an export become.

    Attributes:
        names: of the classes, in the order of their values 1, 2, ...
        novel: some of them.
        values: name of any annotation that is drawn -> value.
        other: value of everything else in colour masks.
        background: its value, or None.
        palette: of the card.
    """

    names: list[str]
    novel: list[str]
    values: dict[str, int]
    other: int
    background: int | None
    palette: Palette

    @property
    def colors(self) -> np.ndarray:
        """Colours of the values, uint8 [256, 3]."""
        return colors_of(self.palette, self.background)


def choose_classes(
    export: Export, chosen: Sequence[str] | None = None, novel: Sequence[str] = (), ignore: Sequence[str] = ()
) -> Classes:
    """Give classes their values.

    Args:
        export: the annotations.
        chosen: names of the classes, in the order of their values; None: all that are there.
        novel: some of them.
        ignore: names of annotations whose pixels are ignored, besides those that labelme calls so.

    Raises:
        InputError: a name is not there, or cannot be that of a class.
    """
    there = Counter()
    for source in export.sources:
        there.update(source.names)
    special = {name: 0 for name in export.class_names if name.casefold() in BACKGROUND}
    special |= dict.fromkeys((IGNORED, *ignore), IGNORE_INDEX)
    names = list(chosen or ()) or [name for name in export.class_names if there[name] and name not in special]
    for flag, given in (('--classes', chosen or ()), ('--novel', novel), ('--ignore', ignore)):
        if twice := [name for name, count in Counter(given).items() if count > 1]:
            raise InputError(f'{flag} names {some(map(repr, twice))} twice; name each once')
    if no_class := [name for name in names if name in special]:
        raise InputError(
            f'{some(map(repr, no_class))} cannot be a class: it is the background, or --ignore names it; leave it out'
        )
    for flag, given, known in (('--classes', names, there), ('--novel', novel, names)):
        if unknown := [name for name in given if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, 3) or list(known)
            raise InputError(f'{flag} {some(map(repr, unknown))}: nothing is annotated so; there is {some(near, 8)}')
    if strange := [name for name in ignore if name not in export.class_names]:
        raise InputError(f'--ignore {some(map(repr, strange))}: nothing is annotated so')
    _check_names(names, novel)
    values = special | {name: value for value, name in enumerate(names, 1)}
    background = 0 if export.colors is None or any(special.get(name) == 0 for name in export.colors) else None
    palette = 'spread'
    if export.colors is not None:
        own = {name: color for name, color in export.colors.items() if name in names or special.get(name) == 0}
        palette = tuple((values[name], color) for name, color in own.items())
    other = 0 if background == 0 else IGNORE_INDEX
    return Classes(names, list(novel), values, other, background, palette)


def _check_names(names, novel):
    folded = Counter(name.casefold() for name in names)
    if equal := [name for name in names if folded[name.casefold()] > 1]:
        raise InputError(f'the names {some(map(repr, equal))} are the same but for capitals; correct the annotations')
    if bad := [name for name in names if not name.isprintable()]:
        raise InputError(f'the names {some(f"{name!a}" for name in bad)} hold control characters; rename them')
    if not 0 < len(names) <= MAX_CLASSES:
        raise InputError(
            f'the annotations have {len(names)} classes; expected 1 to {MAX_CLASSES}, as masks hold 8 bits. --classes '
            'chooses some.'
        )
    if set(novel) == set(names):
        raise InputError('--novel names all classes; at least one must be a base class')


def apply_crowd(export: Export, crowd: str) -> Export:
    """The export without its crowd regions, or with them as ignored pixels."""
    regions = [f'{i.number} of {source.where}' for source in export.sources for i in source.instances if i.crowd]
    if crowd == 'draw' or not regions:
        return export
    sources = []
    for source in export.sources:
        kept = [instance for instance in source.instances if not instance.crowd or crowd == 'ignore']
        names = Counter(instance.category for instance in kept if not instance.crowd)
        if crowd == 'ignore':
            kept = [i._replace(category=IGNORED) if i.crowd else i for i in kept]
        sources.append(replace(source, instances=kept, names=names) if source.instances else source)
    why = 'crowd regions, whose pixels are ignored' if crowd == 'ignore' else 'crowd regions'
    left_out = {**export.left_out, why: regions}
    return replace(export, sources=sources, left_out=left_out)


def draw(source: Source, classes: Classes, rasterizer: str, colors: dict | None) -> tuple[np.ndarray, list[int]]:
    """The mask of a photograph, uint8 [H, W], and the numbers of the objects of which no pixel is visible."""
    if source.colored:
        places, names = read_color_names(source.colored, colors)
        return np.array([classes.values.get(name, classes.other) for name in names], np.uint8)[places], []
    objects = [instance for instance in source.instances if instance.category in classes.values]
    outlines = enumerate((instance.outline for instance in objects), 1)
    numbers = rasterize(*source.size[::-1], outlines, rasterizer, np.int32)
    seen = np.bincount(numbers.ravel(), minlength=len(objects) + 1)[1:] > 0
    hidden = [instance.number for instance, visible in zip(objects, seen, strict=True) if not visible]
    return np.array([0, *(classes.values[i.category] for i in objects)], np.uint8)[numbers], hidden
