"""Errors that are the input's fault, and how a command ends on one."""

import functools
import sys


class InputError(Exception):
    """Something outside the program is wrong; the message says what was found, what was expected and the mend."""


def exits_cleanly(main):
    """Decorate a command's main function: an InputError ends it with its message and exit code 1, no traceback."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # a DataLoader worker wraps the message in its traceback; the message alone is what mends things
            message = str(error).rsplit(f'{InputError.__name__}: ', 1)[-1].strip()
            print(f'error: {message}', file=sys.stderr, flush=True)
            sys.exit(1)

    return wrapper


def some(names, shown=4):
    """A few of many names, for a message."""
    names = list(names)
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')
