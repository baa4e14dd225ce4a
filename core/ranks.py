"""Rank of this process and number of processes, from torchrun's environment variables; one process without torchrun."""

import os


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
