"""Errors that the user's input causes, and how a command ends after an error."""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable

from core.signals import Stopped, end_workers


class InputError(Exception):
    """Something outside the program is wrong. The message says what was found, what was expected and how to fix it."""


class MainProcessError(InputError):
    """An InputError of the main process in the other ones, which do not repeat its message when they end."""


def exits_cleanly(main: Callable, resumes: bool = False) -> Callable:
    """Decorate a command's main function so that expected errors end it with a message and an exit code, no traceback.

    An InputError, a full disk or quota, and the end of another process of the run give exit code 1, Ctrl-C gives 130, a
    closed pipe 141, as in shells, and `Stopped` has its own code. Others are programming errors with a traceback.

    Args:
        main: the function.
        resumes: the same command goes on where it was stopped.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, 'reconfigure'):  # names of files may hold what the terminal's encoding has not
                stream.reconfigure(errors='backslashreplace')
        try:
            return main(*args, **kwargs)
        except MainProcessError:
            sys.exit(1)
        except InputError as error:
            # a DataLoader worker puts its traceback before the message
            message = str(error).rsplit(f'{InputError.__name__}: ', 1)[-1].strip()
            _end(f'error: {message}', 1)
        except KeyboardInterrupt:
            _end('stopped', 130)
        except Stopped as stop:
            _end(f'{stop}; run the same command again to resume' if resumes else str(stop), stop.exit_code)
        except BrokenPipeError:  # whatever read the output has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            what = error.filename or 'the log or the output of this command'
            _end(f'error: no space left to write {what} ({error.strerror}); what was saved is intact', 1)
        except RuntimeError as error:
            # PyTorch's process groups raise this if another process has ended
            if 'WORLD_SIZE' not in os.environ or not _is_from_process_group(error):
                raise
            _end(f'process {os.environ["RANK"]} ends: {str(error).splitlines()[0]}', 1)
        finally:
            end_workers()

    return wrapper


def _is_from_process_group(error):
    """Whether PyTorch's process groups raised an error: by the names of its types, or of Gloo and its sockets."""
    return type(error).__name__.startswith('Dist') or re.search(r'\b(gloo|nccl|socket|TCPStore)\b', str(error), re.I)


def _end(message, code):
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def some(names: Iterable[str], shown: int = 4) -> str:
    """The first `shown` names and the number of the others, for a message."""
    names = list(names)
    return ', '.join(names[:shown]) + (f' and {len(names) - shown} more' if len(names) > shown else '')
