"""Arrays on disk that are computed once and used by many runs, each set in a folder named by what it depends on."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from core import signals
from core.errors import InputError
from core.files import atomic_write
from core.parallel import usable_cores

GB = 10**9
SPARE_DISK = 2 * GB  # left free for checkpoints and logs
INDEX = 'index.json'  # written last; holds the sizes and checksums of all rows
HOST = socket.gethostname().replace('.', '-')
ABANDONED = 86_400  # seconds after which a set that another host began counts as abandoned


def digest(*parts) -> str:
    """SHA-256 in hexadecimal of tensors, dicts of tensors, and what JSON can hold."""
    result = hashlib.sha256()
    for part in parts:
        tensors = part if isinstance(part, dict) and all(map(torch.is_tensor, part.values())) else None
        if tensors is None:
            result.update(json.dumps(part, sort_keys=True).encode())
            continue
        for name, tensor in sorted(tensors.items()):
            result.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
            result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of the bytes of contiguous tensors on the CPU."""
    value = 0
    for _, tensor in sorted(tensors.items()):
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), value)
    return value


class FeatureStore:
    """A folder of sets of arrays. A set is a folder of its own: one file per array, and an index of its rows.

    A set is made in a temporary folder of its run, which is renamed when it is complete. So a run that is killed leaves
    no half set, and no run touches what another one is making. `using` makes a second run that needs the same set wait
    for the first, and keeps a set from being removed while it is opened.

    Args:
        folder: made on first use.
        limit_gb: size of all sets together, in 10^9 bytes. The sets that were used least recently make room.
    """

    def __init__(self, folder: Path, limit_gb: float):
        self.folder, self.limit = Path(folder), limit_gb * GB

    def room(self, name: str = '') -> float:
        """Bytes that a set may take, after others have made room for it; no limit for a set that is there."""
        if (self.folder / name / INDEX).is_file():
            return math.inf
        existing = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        if not os.access(existing, os.W_OK):
            return 0
        used = sum(map(_size, self._sets()))
        begun = sum(map(_size, self.folder.glob('.*.partial')))
        return max(min(self.limit - begun, shutil.disk_usage(existing).free + used - SPARE_DISK), 0)

    def _sets(self):
        """Folders of complete sets, the least recently used first."""
        sets = {}
        for path in self.folder.glob(f'[!.]*/{INDEX}'):  # not those that are being made
            with contextlib.suppress(FileNotFoundError):  # another run has just removed it
                sets[path.parent] = path.parent.stat().st_mtime
        return sorted(sets, key=sets.get)

    @contextlib.contextmanager
    def using(self, name: str, log: Callable[[str], None] = print) -> Iterator[None]:
        """Keep other runs from building or removing a set; waits for one that does. Ends with the process at latest.

        Without locks on this file system, or in a folder that is read-only, nothing is kept off: two runs may then
        compute the same set, and the first one to finish keeps it.

        Raises:
            Stopped: a signal arrived while waiting.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self._lock_path(name), 'w'))
                waits = False
                while not _lock(file):
                    if not waits:
                        log(f'waiting for another run, which computes or opens {self.folder / name}')
                    waits = True
                    signals.raise_if_received()
                    time.sleep(0.2)
            yield

    def _lock_path(self, name):
        return self.folder / f'.{name}.lock'

    def is_complete(self, name: str) -> bool:
        """Whether a set is there and every row has the checksum of its index; a damaged set is removed."""
        folder = self.folder / name
        try:
            arrays, rows = self.load(name)
            with ThreadPoolExecutor(usable_cores()) as threads:  # zlib lets other threads run
                sums = threads.map(lambda row: checksum(_row(arrays, row)), rows)
                intact = all(found == rows[row]['checksum'] for row, found in zip(rows, sums, strict=True))
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if intact:
            os.utime(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return intact

    def begin(self, name: str, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Path:
        """Reserve the files of a new set.

        Args:
            name: of the set.
            shapes: array -> type and shape, whose first dimension counts the rows.

        Returns:
            The temporary folder; `arrays` opens it for writing.

        Raises:
            InputError: the disk has no room.
        """
        need = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
        self._make_room(need)
        folder = self.folder / f'.{name}.{HOST}.{os.getpid()}.partial'
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            for array, (dtype, shape) in shapes.items():
                with open(folder / array, 'wb') as file:
                    # reserved at once: a disk that fills up later would end the process without a message
                    size = dtype.itemsize * math.prod(shape)
                    if hasattr(os, 'posix_fallocate') and size:  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f'cannot keep {need / GB:.1f} GB of features in {self.folder}: {error.strerror}. Use --features memory '
                'or --features off.'
            ) from error
        return folder

    def finish(self, folder: Path, name: str, shapes: dict, rows: dict[int, dict]):
        """Complete a set that `begin` began.

        Args:
            folder, name, shapes: of `begin`.
            rows: row -> what is known of it, among it its 'checksum'. Rows that are missing hold nothing.
        """
        described = {
            array: [str(dtype).removeprefix('torch.'), list(shape)] for array, (dtype, shape) in shapes.items()
        }
        with atomic_write(folder / INDEX) as file:
            json.dump({'arrays': described, 'rows': rows}, file)
        with contextlib.suppress(OSError):  # without locks, another run may have made it meanwhile
            os.rename(folder, self.folder / name)
        shutil.rmtree(folder, ignore_errors=True)

    def discard(self, folder: Path):
        """Remove what `begin` began."""
        shutil.rmtree(folder, ignore_errors=True)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[int, dict]]:
        """The arrays of a complete set, mapped from disk (changes stay in memory), and what is known of its rows."""
        index = json.loads((self.folder / name / INDEX).read_text())
        shapes = {array: (getattr(torch, dtype), tuple(shape)) for array, (dtype, shape) in index['arrays'].items()}
        rows = {int(row): known for row, known in index['rows'].items()}
        return self.arrays(self.folder / name, shapes, 'c'), rows

    @staticmethod
    def arrays(folder: Path, shapes: dict, mode: str = 'r+') -> dict[str, torch.Tensor]:
        """The arrays of a set in a folder, mapped from disk."""
        mapped = {}
        for array, (dtype, shape) in shapes.items():
            file = np.memmap(folder / array, np.uint8, mode, shape=(dtype.itemsize * math.prod(shape),))
            mapped[array] = torch.from_numpy(file).view(dtype).view(shape)
        return mapped

    def _make_room(self, need):
        """Remove abandoned sets, then the least recently used ones until a new one fits.

        Runs that have opened a set keep what they have mapped.
        """
        for partial in self.folder.glob('.*.partial'):
            if _is_abandoned(partial):
                shutil.rmtree(partial, ignore_errors=True)
        sets = self._sets()
        used = sum(map(_size, sets)) + sum(map(_size, self.folder.glob('.*.partial')))
        for folder in sets:
            if used + need <= self.limit and need + SPARE_DISK <= shutil.disk_usage(self.folder).free:
                break
            with contextlib.suppress(OSError), open(self._lock_path(folder.name), 'w') as file:
                if _lock(file):
                    used -= _size(folder)
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(file):
    """Whether nobody else holds the lock of an open file, which is held from now on if the file system has locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True


def _is_abandoned(partial):
    """Whether the run that began a set is gone, as far as can be told from its host and process."""
    *_, host, process, _ = partial.name.split('.')
    if host == HOST:
        with contextlib.suppress(PermissionError):  # of another user, so it is alive
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                return True
        return False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - partial.stat().st_mtime > ABANDONED
    return False


def _row(arrays, row):
    return {array: tensor[row] for array, tensor in arrays.items()}


def _size(folder):
    """Bytes of the files in a folder, which other runs may remove meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            total += path.stat().st_size
    return total
