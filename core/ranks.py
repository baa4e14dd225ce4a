"""Which process of a run this is, as torchrun announces it in the environment; without torchrun, the only one."""

import os


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get('WORLD_SIZE', 1))


def local_world_size() -> int:
    """Number of processes of this run on this host."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def rank() -> int:
    """This process's number, 0 .. world_size() - 1."""
    return int(os.environ.get('RANK', 0))


def local_rank() -> int:
    """This process's number on its host, which is also its GPU's."""
    return int(os.environ.get('LOCAL_RANK', 0))


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0
