"""The snapshot folder of a run: used by one run at a time, and where an interrupted run goes on from."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
from pathlib import Path

from utils.checkpoint import read_state
from utils.distributed import is_main, shared
from utils.errors import InputError, some
from utils.files import check_writable

# flags that say how a run is carried out, and that may change when it goes on; what comes of it depends on the others
# (batch statistics of parts, the cache's half precision and images that are skipped aside)
EXECUTION_FLAGS = {
    'accumulate', 'compile', 'data_dir', 'device', 'num_workers', 'overwrite', 'print_frequency', 'resume',
    'save_every_minutes', 'save_every_steps', 'save_pred_every', 'select', 'skip_bad_images', 'snapshot_dir',
    'test_batch_size', 'timeout_minutes', 'train_list', 'val_cache', 'val_cache_gb', 'val_list',
}  # fmt: skip
RUN_FILES = ('last*.pth', 'previous*.pth', 'best*.pth', 'epoch_*.pth', 'metrics.jsonl', 'log.txt', 'args.json', 'tb')


class Snapshots:
    """What a snapshot folder holds of a run.

    Args:
        folder (Path): --snapshot-dir.
        arguments (dict): of this run (`run_arguments`), stored in its checkpoints.
        resume (str): 'auto', 'off' or a checkpoint file.
        overwrite (bool): with 'off': remove an earlier run.
        seeds (sequence): of stage 2; (None,) for stage 1.

    Raises:
        InputError: the folder holds another run, or one that is not to be continued.
    """

    def __init__(self, folder, arguments, resume, overwrite=False, seeds=(None,)):
        self.folder, self.arguments = Path(folder), arguments
        self._found = shared(lambda: self._find(resume, overwrite, seeds))  # seed -> where a run goes on from

    def state(self, seed=None):
        """What `checkpoint.save_checkpoint` stored of a seed, or None."""
        found = self._found.get(seed)
        if not found:
            return None
        state = read_state(found['path'])
        if found['reopened']:
            state['training']['progress']['finished'] = False
        return state

    def any_path(self):
        """A file that holds the base network that this run's states share, or None."""
        return next((found['path'] for found in self._found.values()), None)

    def path(self, name, seed=None):
        """FOLDER/name.pth, or FOLDER/name_{seed}.pth."""
        return self.folder / (f'{name}.pth' if seed is None else f'{name}_{seed}.pth')

    def metrics_size(self):
        """Bytes of metrics.jsonl that belong to what is there."""
        return max((found['metrics_size'] for found in self._found.values()), default=0)

    def _find(self, resume, overwrite, seeds):
        if resume == 'off':
            self._start_over(overwrite)
            return {}
        found = {seed: latest for seed in seeds if (latest := self._latest(seed))}
        if resume != 'auto':
            state = read_state(resume)
            seed = state['config'].get('seed')
            if seed not in seeds:
                raise InputError(f'--resume {resume} is of seed {seed}; this run has {some(map(str, seeds))}')
            elsewhere = Path(resume).resolve().parent != self.folder.resolve()
            for other in found.values():  # they go on together
                other |= {'arguments': self.arguments, 'reopened': True}
            found[seed] = {
                'path': str(resume),
                'arguments': self.arguments,  # other ones are what it is there for,
                'reopened': True,  # more epochs among them
                'metrics_size': 0 if elsewhere else state['training']['metrics_size'],
            }
        for latest in found.values():
            self._check_same(latest)
        return found

    def _latest(self, seed):
        """Where to go on from: `last`, or `previous` where `last` cannot be read; None where there is neither."""
        broken = []
        for name in ('last', 'previous'):
            path = self.path(name, seed)
            if path.is_file():
                try:
                    state = read_state(path)
                except InputError as error:
                    broken.append(str(error))
                else:
                    if broken:
                        print(f'warning: {broken[0]}\nwarning: going on from {path}', flush=True)
                    training = state['training']
                    return {
                        'path': str(path), 'arguments': training['arguments'], 'reopened': False,
                        'metrics_size': training['metrics_size'],
                    }  # fmt: skip
        if broken:
            raise InputError(f'{broken[0]} There is no earlier good checkpoint; --resume off --overwrite starts over.')
        return None

    def _check_same(self, found):
        earlier = found['arguments']
        differing = [
            f'{name} was {earlier.get(name)}, is {self.arguments.get(name)}'
            for name in sorted({*earlier, *self.arguments})
            if earlier.get(name) != self.arguments.get(name)
        ]
        if differing:
            raise InputError(
                f'{self.folder} holds a run with other arguments: {"; ".join(differing)}. Use another --snapshot-dir, '
                f'--resume {found["path"]} to go on from its weights and optimiser with these arguments, or '
                '--resume off --overwrite to start over.'
            )

    def _start_over(self, overwrite):
        present = [path for pattern in RUN_FILES for path in self.folder.glob(pattern)]
        if present and not overwrite:
            raise InputError(
                f'{self.folder} holds an earlier run ({some(sorted(path.name for path in present))}); --overwrite '
                'removes it, --resume auto continues it'
            )
        for path in present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_arguments(args, lists):
    """What a run depends on: its flags, and the contents of its lists and base network, as plain values.

    Args:
        args (Namespace): the flags.
        lists (dict): name -> path of a file.
    """
    flags = {name: _plain(value) for name, value in vars(args).items() if name not in EXECUTION_FLAGS}
    digests = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] for name, path in lists.items()}
    return flags | {f'content of {name}': digest for name, digest in digests.items()}


def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a snapshot folder until the block ends, or the process, however it does.

    Raises:
        InputError: another process has it.
    """
    if not is_main():
        yield
        return
    check_writable(folder)
    with open(Path(folder) / '.lock', 'a+') as file:
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
        yield
