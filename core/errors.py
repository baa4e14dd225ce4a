"""Errors that are the input's fault, and how a command ends on one."""

import errno
import functools
import os
import re
import sys

from core.signals import Stopped, end_workers


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
            _end(f'error: {message}', 1)
        except KeyboardInterrupt:
            _end('stopped', 130)
        except Stopped as stop:
            _end(f'{stop}; the same command goes on from here', stop.exit_code)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _end(f'error: no space left to write {error.filename or "the log"}; what was saved is intact', 1)
        except RuntimeError as error:
            # what PyTorch's process groups raise where another process has ended
            if 'WORLD_SIZE' not in os.environ or not re.search('gloo|nccl|socket|store', str(error), re.IGNORECASE):
                raise
            _end(f'process {os.environ["RANK"]} ends: {str(error).splitlines()[0]}', 1)
        finally:
            end_workers()

    return wrapper


def _end(message, code):
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def some(names, shown=4):
    """A few of many names, for a message."""
    names = list(names)
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')
