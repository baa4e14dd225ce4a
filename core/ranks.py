"""Rank of this process and number of processes, from torchrun's environment variables; one process without torchrun."""

import os

from core.errors import InputError

VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')  # set by torchrun, together with those of the rendezvous
RENDEZVOUS = ('MASTER_ADDR', 'MASTER_PORT')


def check_ranks():
    """Refuse an environment that says half of what torchrun says: a process would take itself for another one.

    Raises:
        InputError: variables are missing, or their values do not fit each other.
    """
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not found:
        return
    told = ', '.join(f'{name}={value}' for name, value in found.items())
    fix = 'Start several processes with torchrun, which sets all of them; for a single process, unset them'
    if missing := [name for name in (*VARIABLES, *RENDEZVOUS) if name not in os.environ]:
        raise InputError(f'the environment has {told}, but no {", ".join(missing)}. {fix}.')
    numbers = [int(value) if value.isdecimal() else -1 for value in found.values()]
    if min(numbers) < 0 or not max(numbers[0], numbers[2]) < numbers[1]:
        raise InputError(f'the environment has {told}; expected ranks 0 .. WORLD_SIZE - 1. {fix}.')


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get('WORLD_SIZE', 1))


def local_world_size() -> int:
    """Number of processes of this run on this host."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def rank() -> int:
    """Number of this process, 0 .. world_size() - 1."""
    return int(os.environ.get('RANK', 0))


def local_rank() -> int:
    """Number of this process on its host, and of its GPU."""
    return int(os.environ.get('LOCAL_RANK', 0))


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0
