"""A run of training: its processes, its folder, its log and its checkpoints."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from core import signals
from core.errors import InputError
from core.files import check_writable
from core.ranks import is_main
from engine.checkpoint import save_checkpoint
from engine.distributed import process_group
from engine.logger import RunLogger
from engine.resume import RunFolder
from engine.stage import Stage


@contextlib.contextmanager
def training_process(folder: Path, device: str, timeout_minutes: float, deterministic: bool) -> Iterator[torch.device]:
    """Join the processes of a training run, lock its folder, and make SIGTERM and SIGINT save before they end it.

    Args:
        folder: the snapshot folder.
        device, timeout_minutes, deterministic: as in `distributed.process_group`.

    Yields:
        This process's device.

    Raises:
        InputError: there is no such device, or another run uses --snapshot-dir.
    """
    with process_group(device, timeout_minutes, deterministic) as process_device, locked(folder):
        signals.listen(tell=is_main())
        yield process_device


class Run:
    """What a trainer writes to. Make it after all checks have passed: it deletes the earlier run of --overwrite.

    Args:
        folder: the snapshot folder, and what the run resumes from.
        arguments: the flags, for args.json.
        notes: logged first.
    """

    def __init__(self, folder: RunFolder, arguments: dict, notes: Sequence[str] = ()):
        folder.remove_earlier_run()
        self.folder, self.arguments = folder, arguments
        self.logger = RunLogger(folder.path(), arguments, folder)
        for note in notes:
            self.logger.info(f'note: {note}')

    def save(self, name: str, stage: Stage, epoch: int, metrics: dict, training: dict | None = None):
        """Write a checkpoint of a stage's network.

        Args:
            name: 'last', whose predecessor becomes 'previous', 'best' or 'epoch_N'.
            stage: has the network, its config and its seed.
            epoch: epochs done.
            metrics: validation metrics of these weights.
            training: the trainer's state, where the run can resume from this checkpoint.
        """
        if training:
            records = self.logger.sync_records(stage.seed)
            training = training | {'arguments': self.folder.arguments[stage.seed], 'records': records}
        save_checkpoint(
            self.folder.path(name, stage.seed), stage.net, stage.config, epoch, metrics, training,
            previous=self.folder.path('previous', stage.seed) if name == 'last' else None,
        )  # fmt: skip


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a snapshot folder until the block or the process ends.

    A folder that is new, and in which nothing was written, is removed again.

    Raises:
        InputError: another process has locked it.
    """
    if not is_main():
        yield
        return
    folder = Path(folder)
    is_new = not folder.exists()
    check_writable(folder)
    with open(folder / '.lock', 'a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(
                f'{folder} is in use by another run ({file.read().strip()}); wait for it, or use another --snapshot-dir'
            ) from None
        except OSError as error:  # a file system without locks
            print(f'warning: {folder} cannot be locked ({error.strerror})', flush=True)
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # whatever ends the run is what counts
                if is_new and os.listdir(folder) == ['.lock']:
                    os.unlink(file.name)
                    os.rmdir(folder)
