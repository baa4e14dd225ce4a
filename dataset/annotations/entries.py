"""What annotation files of other tools hold: JSON, whose entries are checked, and every fault named."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import InputError, some

# what a field must be: a test of its value, and the words for it
Field = tuple[Callable[[Any], bool], str]
SIZE: Field = (lambda value: type(value) is int and value > 0, 'an integer > 0')
TEXT: Field = (lambda value: isinstance(value, str) and value.strip() != '', 'a text')


class Fault(Exception):
    """An entry of a file does not follow the format.

    Attributes:
        expected: what the format demands, the same for all entries with this fault.
        found: what this entry has instead, short.
    """

    def __init__(self, expected: str, found: str):
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


def shortened(value: Any) -> str:
    """A value as JSON writes it, or the beginning of that."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f'{text[:36]} ...'


def check_fields(entry: Any, fields: Mapping[str, Field], defaults: Mapping[str, Any]):
    """Raise Fault unless an entry is an object whose fields, or their defaults, are what they must be."""
    if not isinstance(entry, dict):
        raise Fault('an entry must be an object', shortened(entry))
    for name, (valid, expected) in fields.items():
        if not valid(entry.get(name, defaults.get(name))):
            raise Fault(f'{name} must be {expected}', shortened(entry[name]) if name in entry else f'no {name}')


class Faults:
    """Collects the faults of all entries, so that one message names them.

    Args:
        what: the file or folder, and the format that it does not follow, in the message.
    """

    def __init__(self, what: str):
        self.what = what
        self.by_kind = defaultdict(list)

    def add(self, where: str, fault: Fault):
        """A fault of the entry that `where` names."""
        self.by_kind[fault.expected].append(f'{where} has {fault.found}')

    def check_unique(self, what: str, values: Mapping[str, str]):
        """`values`: entry -> value that no other entry may have."""
        first = {}
        for where, value in values.items():
            if first.setdefault(value, where) != where:
                self.by_kind[f'{what} must differ'].append(f'{where} and {first[value]} have "{value}"')

    def raise_any(self):
        """Raise InputError if there are faults."""
        if self.by_kind:
            lines = (f'\n  {expected}: {some(found)}' for expected, found in self.by_kind.items())
            raise InputError(f'{self.what}. Correct these entries, or export again.' + ''.join(lines))


class _RepeatedKey(ValueError):
    pass


def _object(pairs):
    """A JSON object whose keys differ; json itself would keep the last of equal ones."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in entry if keys.count(key) > 1)
        raise _RepeatedKey(f'"{repeated}" occurs twice in one object, {shortened(entry)}')
    return entry


def read_json(path: Path, kind: str) -> Any:
    """The content of a JSON file in any encoding of Unicode.

    Args:
        path: of the file.
        kind: what it should be, e.g. 'a COCO instances file', in messages.

    Raises:
        InputError: the file is missing or no JSON, or a key is twice in one object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f'{path} does not exist') from None
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror})') from error
    try:
        return json.loads(content, object_pairs_hook=_object)
    except _RepeatedKey as error:
        raise InputError(f'{path} is ambiguous: {error}. Remove one of the two.') from None
    except (ValueError, RecursionError) as error:
        reason = _why_not_json(content, error)
        raise InputError(f'{path} is not {kind}: {reason}. Copy, unpack or export it again.') from error


def _why_not_json(content, error):
    if not content.strip():
        return 'it is empty'
    if isinstance(error, UnicodeDecodeError):
        return f'it is no UTF-8 text ({error})'
    if isinstance(error, json.JSONDecodeError):
        if error.pos == 0:
            return f'it is no JSON, since it begins with {content[:40]!r}'
        text = error.doc.rstrip()
        if error.pos >= len(text) or not text.endswith(('}', ']')):
            return 'it ends in the middle'
    return f'it is no JSON ({error})'
