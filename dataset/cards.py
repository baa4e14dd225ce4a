"""Read cards: a data set as a file, dataset.yaml. docs/own_data.md explains the keys.

The built-in data sets are cards too (`classes`). Every error names the file, the line and the key.
"""

import difflib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from core.errors import InputError, some
from dataset.legend import PALETTES, Palette, colors_of
from dataset.spec import MAX_CLASSES, DatasetSpec

FILE_NAME = 'dataset.yaml'
BUILT_IN = Path(__file__).parent / 'cards'
KEYS = (
    'name', 'names', 'background', 'ignore', 'novel', 'folds', 'images', 'masks', 'train', 'val', 'test',
    'lists_in_data', 'scale_range', 'min_pixels', 'batch_size', 'palette', 'hint',
)  # fmt: skip
SPLITS = ('train', 'val', 'test')
BACKGROUND = 'background'
PLAIN_TAGS = ('tag:yaml.org,2002:seq', 'tag:yaml.org,2002:map')


@dataclass(frozen=True)
class Entry:
    """A value in a card and where it is. Its methods return it as what is expected, or raise InputError.

    Attributes:
        path: of the card.
        key: that it belongs to; '' for the whole card.
        node: as PyYAML has parsed it.
    """

    path: Path
    key: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return self.node.start_mark.line + 1

    def refused(self, text: str) -> InputError:
        """The error that says what is wrong with the value."""
        return InputError(f'{self.path}, line {self.line}: {f"{self.key}: " if self.key else ""}{text}')

    def expected(self, what: str) -> InputError:
        """The error where the value is something else than expected."""
        return self.refused(f'got {self._shown()}; expected {what}')

    def _shown(self):
        kinds = {yaml.SequenceNode: 'a list', yaml.MappingNode: 'a list of "key: value"'}
        return kinds.get(type(self.node)) or repr(self.scalar())

    def scalar(self) -> object:
        """A text, number, date, truth value or None as YAML understands it; None for lists too."""
        if not isinstance(self.node, yaml.ScalarNode):
            return None
        try:
            return yaml.constructor.SafeConstructor().construct_object(self.node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.refused(f'{self.node.value!r} cannot be read: {str(error).splitlines()[0]}') from None

    @property
    def is_none(self) -> bool:
        """Whether the value is none, None, null, ~ or nothing at all."""
        value = self.scalar()
        return isinstance(self.node, yaml.ScalarNode) and (value is None or str(value).lower() == 'none')

    def text(self, what: str = 'a text') -> str:
        value = self.scalar()
        if isinstance(value, str) and value.strip() and value.isprintable():
            return value.strip()
        quote = '; put it into quotes' if value is not None and not isinstance(value, str) else ''
        raise self.expected(f'{what}{quote}')

    def integer(self, low: int = 1, high: int | None = None) -> int:
        value = self.scalar()
        if type(value) is not int or value < low or (high is not None and value > high):
            raise self.expected(f'a whole number of {low}..{high}' if high else f'a whole number >= {low}')
        return value

    def number(self) -> float:
        value = self.scalar()
        if type(value) not in (int, float):
            raise self.expected('a number')
        return float(value)

    def flag(self) -> bool:
        if not isinstance(self.scalar(), bool):
            raise self.expected('true or false')
        return self.scalar()

    def items(self, what: str, alone: bool = False) -> list['Entry']:
        """The entries of a list, or a single value in place of it where that is allowed."""
        if self.is_a(yaml.SequenceNode):
            return [Entry(self.path, self.key, node) for node in self.node.value]
        if alone and isinstance(self.node, yaml.ScalarNode) and not self.is_none:
            return [self]
        raise self.expected(what)

    def is_a(self, kind: type[yaml.CollectionNode]) -> bool:
        """Whether the value is a plain list or mapping; refuses what a tag makes of it."""
        if isinstance(self.node, kind) and self.node.tag not in PLAIN_TAGS:
            raise self.refused(f'the tag {self.node.tag} is not supported; remove it')
        return isinstance(self.node, kind)

    def pairs(self) -> list[tuple['Entry', 'Entry']]:
        """Keys and values of a mapping; no key is there twice."""
        pairs = [tuple(Entry(self.path, self.key, node) for node in pair) for pair in self.node.value]
        first = {}
        for key, _ in pairs:
            name = key.scalar()
            if not isinstance(key.node, yaml.ScalarNode):
                raise key.expected('a key')
            if name in first:
                raise key.refused(f'{name!r} is there twice; the first is in line {first[name]}')
            first[name] = key.line
        return pairs


def read_entries(path: Path) -> dict[str, Entry]:
    """Key -> value of a card; raises InputError unless it is a mapping with known keys, each of them once."""
    try:
        node = yaml.compose(path.read_bytes(), yaml.SafeLoader)
    except OSError as error:
        raise InputError(f'{path} cannot be read: {error.strerror}') from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        place = f', line {mark.line + 1}' if mark else ''
        reason = getattr(error, 'problem', None) or str(error).splitlines()[0]
        raise InputError(f'{path}{place}: this is no YAML: {reason}') from error
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f'{path} holds no "key: value" lines; expected some of {", ".join(KEYS)}')
    entries = {}
    for key, value in Entry(path, '', node).pairs():
        name = key.scalar()
        if name not in KEYS:
            near = difflib.get_close_matches(str(name), KEYS, 1)
            hint = f'; did you mean {near[0]}?' if near else '.'
            raise key.refused(f'{name!r} is no key of a card{hint} Keys are {", ".join(KEYS)}')
        entries[name] = Entry(path, name, value.node)
    return entries


def read_card(path: Path) -> DatasetSpec:
    """Read a card.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown or missing, or a value cannot be used.
    """
    entries = read_entries(path)
    for key in ('names', 'images', 'masks'):
        if key not in entries:
            raise InputError(f'{path} has no {key!r}; docs/own_data.md shows a card')
    classes, named = _classes(entries['names'])
    background = _background(entries.get('background'), classes, named)
    taken = [*classes, *(() if background is None else (background,))]
    ignore = _ignored(entries.get('ignore'), taken)
    in_data = 'lists_in_data' in entries and entries['lists_in_data'].flag()
    lists = {split: _list(entries.get(split), split, path, in_data) for split in SPLITS}
    chosen = {
        key: read(entries[key])
        for key, read in (
            ('scale_range', _scale_range), ('min_pixels', Entry.integer), ('batch_size', Entry.integer),
            ('hint', Entry.text),
        )
        if key in entries
    }  # fmt: skip
    if 'palette' in entries:
        chosen['palette'] = _palette(entries['palette'], classes, background, (*taken, *ignore))
    return DatasetSpec(
        name=entries['name'].text() if 'name' in entries else path.resolve().parent.name,
        classes=classes, background=background, ignore=ignore, folds=_folds(entries, classes),
        images=_folders(entries['images'], lists), masks=_folders(entries['masks'], lists),
        train_list=lists['train'], val_list=lists['val'], test_list=lists['test'], lists_in_data=in_data,
        root=None if path.parent == BUILT_IN else path.parent, card=path, **chosen,
    )  # fmt: skip


def _classes(entry):
    """Class id -> name, ascending; and the value that is named background, or None."""
    what = 'a list of names, whose values in masks are 1, 2, ..., or "value: name" lines'
    if entry.is_a(yaml.MappingNode):
        pairs = [(key.integer(0, 255), name) for key, name in entry.pairs()]
    else:
        pairs = list(enumerate(entry.items(what), 1))
    classes, lines, named = {}, {}, None
    for value, item in pairs:
        name = item.text('the name of a class')
        if name.casefold() in lines:
            raise item.refused(f'{name!r} is there twice; the first is in line {lines[name.casefold()]}')
        lines[name.casefold()] = item.line
        if name.casefold() == BACKGROUND:
            if not entry.is_a(yaml.MappingNode):
                raise item.refused(
                    'background is no class. Leave it out of the list, in which names have the values 1, 2, ..., or '
                    'write all as "value: name"'
                )
            named = value
        else:
            classes[value] = name
    if not 0 < len(classes) <= MAX_CLASSES:
        raise entry.refused(f'got {len(classes)} classes; expected 1 to {MAX_CLASSES}')
    return dict(sorted(classes.items())), named


def _background(entry, classes, named):
    """Value of the background: as given or named; by default 0, unless that is a class; or None."""
    if entry is None:
        return named if named is not None else (None if 0 in classes else 0)
    value = None if entry.is_none else entry.integer(0, 255)
    if value in classes:
        raise entry.refused(f'{value} is the class {classes[value]!r}; expected another value, or none')
    if named is not None and value != named:
        raise entry.refused(f'got {entry.scalar()!r}, but names calls {named} background')
    return value


def _ignored(entry, taken):
    """Ignored values; by default 255 where it is no class and not the background."""
    if entry is None:
        return () if 255 in taken else (255,)
    values = [] if entry.is_none else entry.items('values of masks', alone=True)
    for item in values:
        if item.integer(0, 255) in taken:
            raise item.refused(f'{item.scalar()} is a class or the background; expected other values')
    return tuple(sorted({item.scalar() for item in values}))


def _folds(entries, classes):
    """Novel class ids of each fold."""
    if 'novel' in entries and 'folds' in entries:
        raise entries['novel'].refused(f'folds, in line {entries["folds"].line}, names novel classes too; give one')
    if 'novel' in entries:
        return (_fold(entries['novel'], classes),)
    what = 'a list of folds, each of them a list of novel classes'
    if 'folds' not in entries:
        return ()
    folds = entries['folds'].items(what)
    if not folds:
        raise entries['folds'].expected(what)
    return tuple(_fold(item, classes) for item in folds)


def _fold(entry, classes):
    items = entry.items('a list of novel classes, by name or value', alone=entry.key == 'novel')
    ids = [_class_id(item, classes) for item in items]
    if not ids or len(set(ids)) < len(ids) or len(ids) == len(classes):
        raise entry.refused(f'got {len(ids)} classes; expected different ones that leave at least one base class')
    return tuple(sorted(ids))


def _class_id(entry, classes):
    """The class that a name or a value means."""
    value = entry.scalar()
    if type(value) is int and value in classes:
        return value
    ids = {name: class_id for class_id, name in classes.items()}
    if not isinstance(value, str) or value not in ids:
        near = difflib.get_close_matches(str(value), ids, 1)
        hint = f'; did you mean {near[0]}?' if near else '; a list is written [a, b]' if ',' in str(value) else ''
        raise entry.expected(f'one of the names {some(ids, 8)}, or its value{hint}')
    return ids[value]


def _list(entry, split, path, in_data):
    """The list of a split; None for the test split by default, and for validation where it is 'none'."""
    if split != 'train' and entry is not None and entry.is_none:
        return None
    if entry is None and split == 'test':
        return None
    if entry is not None and entry.is_none:
        raise entry.expected('a file of image ids')
    text = entry.text('a file of image ids') if entry else f'list/{split}.txt'
    if in_data:
        return Path(text)
    # only of the built-in cards is known that '..' crosses no link
    return Path(os.path.normpath(path.parent / text)) if path.parent == BUILT_IN else path.parent / text


def _folders(entry, lists):
    """Split -> folder. One folder is that of all splits; otherwise each split that has a list names its own."""
    if not entry.is_a(yaml.MappingNode):
        return dict.fromkeys(SPLITS, entry.text('a folder, or {train: folder, val: folder}'))
    folders = {}
    for key, folder in entry.pairs():
        if key.scalar() not in SPLITS:
            raise key.expected(f'one of {", ".join(SPLITS)}')
        folders[key.scalar()] = folder.text('a folder')
    if missing := [split for split, path in lists.items() if path and split not in folders]:
        raise entry.refused(f'there is no folder for {", ".join(missing)}')
    return dict.fromkeys(SPLITS, folders['train']) | folders


def _scale_range(entry):
    numbers = [item.number() for item in entry.items('[low, high]')]
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < float('inf'):
        raise entry.refused(f'got {numbers}; expected [low, high] with 0 < low <= high')
    return tuple(numbers)


def _palette(entry, classes, background, values: Collection[int]) -> Palette:
    if not entry.is_a(yaml.MappingNode):
        if entry.scalar() not in PALETTES:
            raise entry.expected(f'one of {", ".join(PALETTES)}, or "class: [red, green, blue]" lines')
        return entry.scalar()
    known = classes if background is None else {**classes, background: BACKGROUND}
    own = []
    for key, color in entry.pairs():
        channels = tuple(item.integer(0, 255) for item in color.items('[red, green, blue]'))
        if len(channels) != 3:
            raise color.refused(f'got {len(channels)} numbers; expected [red, green, blue]')
        own.append((_class_id(key, known), channels))
    colors, shown = colors_of(tuple(own), background), {}
    for value in values:
        other = shown.setdefault(colors[value].tobytes(), value)
        if other != value:
            raise entry.refused(f'the values {other} and {value} have the same colour {colors[value].tolist()}')
    return tuple(own)
