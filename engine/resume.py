"""The snapshot folder of a run: used by one run at a time, and where an interrupted run goes on from."""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import socket
from pathlib import Path

from core.errors import InputError, some
from core.files import check_writable
from engine.checkpoint import check_config, of_seeds, read_state
from engine.distributed import barrier, is_main, on_main
from engine.precision import name_of

# flags that say how a run is carried out, and that may change when it goes on; what comes of it depends on the others
# (batch statistics of parts, the cache's half precision and images that are skipped aside)
EXECUTION_FLAGS = {
    'accumulate', 'compile', 'data_dir', 'device', 'fp16', 'num_workers', 'overwrite', 'print_frequency', 'resume',
    'save_every_minutes', 'save_every_steps', 'save_pred_every', 'select', 'skip_bad_images', 'snapshot_dir',
    'test_batch_size', 'timeout_minutes', 'train_list', 'val_cache', 'val_cache_gb', 'val_list',
}  # fmt: skip
# flags that a run which goes on from a file must share with it: what its network, optimiser and steps rest on
FIXED_FLAGS = (
    'dataset', 'fold', 'model', 'backbone', 'os', 'shot', 'batch_size', 'start_epoch', 'fix_bn',
    'freeze_backbone', 'filter_novel', 'content of training list', 'content of base network',
)  # fmt: skip
CHECKPOINTS = ('last', 'previous', 'best')  # with the seed behind it in stage 2
RUN_FILES = (
    'last*.pth', 'last*.damaged', 'previous*.pth', 'best*.pth', 'epoch_*.pth', 'metrics.jsonl', 'log.txt', 'args.json',
    'tb',
)  # fmt: skip


class RunFolder:
    """What a snapshot folder holds of a run.

    Args:
        folder (Path): --snapshot-dir.
        arguments (dict): seed -> what this run depends on (`run_arguments`), stored in its checkpoints; the seed is
            None in stage 1. Seeds may come later.
        resume (str): 'auto', 'off' or a checkpoint file.
        overwrite (bool): unless 'auto': remove an earlier run.
        classes (list): of the fold (`Legend.classes`), which a run that goes on must have been about.

    Raises:
        InputError: the folder holds another run, one of the other stage, or one that is not to be continued, or the
            file is of another run. Nothing has been changed then.
    """

    def __init__(self, folder, arguments, resume, overwrite=False, classes=()):
        self.folder, self.arguments, self.classes = Path(folder), arguments, classes
        self._given_up = []
        self._found = on_main(lambda: self._find(resume, overwrite))  # seed -> where a run goes on from

    def make_room(self):
        """Remove the earlier run that --overwrite gives up; called when nothing is left to be refused."""
        barrier()  # every process has read what it starts from
        for path in self._given_up:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._given_up = []

    def state(self, seed=None):
        """What `checkpoint.save_checkpoint` stored of a seed, or None."""
        found = self._found.get(seed)
        if not found:
            return None
        state = read_state(found['path'])
        if found['reopened']:
            state['training']['progress']['finished'] = False
        if not self._contains(found['path']):  # the best checkpoint is not in this folder
            state['training']['progress'] |= {'best': None, 'best_epoch': state['epoch']}
        return state

    def holds(self, seed=None):
        """Whether there is something of this seed to go on from."""
        return seed in self._found

    def any_path(self):
        """A file that holds the base network that this run's states share, or None."""
        return next((found['path'] for found in self._found.values()), None)

    def path(self, name, seed=None):
        """FOLDER/name.pth, or FOLDER/name_{seed}.pth."""
        return self.folder / (f'{name}.pth' if seed is None else f'{name}_{seed}.pth')

    def keeps(self, record):
        """Whether a record of metrics.jsonl stays: of seeds left alone, and of what was done before a run goes on."""
        seed = record.get('seed')
        if seed not in self.arguments:
            return True
        if seed not in self._found:
            return False
        found = self._found[seed]
        return record['epoch'] <= found['epoch'] or (record['kind'] == 'train' and record['step'] <= found['step'])

    @property
    def records(self):
        """Seed -> how many records metrics.jsonl must hold of what was done before."""
        return {seed: found['records'] for seed, found in self._found.items()}

    def _find(self, resume, overwrite):
        self._check_stage()
        if resume == 'off':
            self._give_up(overwrite)
            return {}
        if resume != 'auto':
            return self._from_file(resume, overwrite)
        found = {seed: latest for seed in self.arguments if (latest := self._latest(seed))}
        for seed, latest in found.items():
            self._check_same(seed, latest)
        return found

    def _check_stage(self):
        """Refuse, also with --overwrite, a folder of the other stage: its arguments and curves would be replaced."""
        stage = 1 if None in self.arguments else 2
        paths = (self.path(name) for name in CHECKPOINTS)
        others = [other for path in paths
                  for other in (of_seeds(path) if stage == 1 else [path] if path.is_file() else [])]  # fmt: skip
        if others:
            names = some(sorted(path.name for path in others))
            raise InputError(
                f'{self.folder} holds a run of stage {3 - stage} ({names}); this one is of stage '
                f'{stage}. Give it a --snapshot-dir of its own.'
            )

    def _from_file(self, path, overwrite):
        """Go on from a file, as far as it and this run's flags allow, with its own folder's other seeds."""
        state = read_state(path)
        seed, training = state['config'].get('seed'), state['training']
        if seed not in self.arguments:
            kind = 'a checkpoint of stage 1' if seed is None else f'of seed {seed}'
            ours = 'is of stage 1' if None in self.arguments else f'has the seeds {some(map(str, self.arguments))}'
            raise InputError(f'--resume {path} is {kind}; this run {ours}')
        check_config(path, state['config'], {'classes': self.classes})
        done, asked = training['progress']['epoch'], self.arguments[seed].get('num_epoch', math.inf)
        if done > asked or (done == asked and not self._contains(path)):
            raise InputError(f'--resume {path} has done {done} epochs already; give a --num-epoch above that')
        found = {}
        if self._contains(path):
            found = {other: latest for other in self.arguments if (latest := self._latest(other))}
        found[seed] = _resumable(path, state)
        for of_seed, latest in found.items():  # they go on together
            latest['reopened'] = True
            if differing := _differing(latest['arguments'], self.arguments[of_seed], FIXED_FLAGS):
                raise InputError(
                    f'{latest["path"]} cannot be gone on from: its network, optimiser or steps do not fit '
                    f'({"; ".join(differing)}). Use --restore-from to start from its weights.'
                )
        if not self._contains(path):
            self._give_up(overwrite)
            found[seed]['records'] = 0
        return found

    def _contains(self, path):
        """Whether a file is directly in this folder."""
        return Path(path).resolve().parent == self.folder.resolve()

    def _latest(self, seed):
        """Where to go on from: `last`, or `previous` where `last` cannot be read; None where there is neither."""
        broken = {}
        for name in ('last', 'previous'):
            path = self.path(name, seed)
            if path.is_file():
                try:
                    state = read_state(path)
                except InputError as error:
                    broken[path] = error
                    continue
                for damaged, error in broken.items():
                    print(f'warning: {error}\nwarning: going on from {path}', flush=True)
                    damaged.replace(damaged.with_suffix('.damaged'))  # else it would become `previous`
                check_config(path, state['config'], {'classes': self.classes})
                return _resumable(path, state)
        if broken:
            error = next(iter(broken.values()))
            raise InputError(f'{error} There is no earlier good checkpoint; --resume off --overwrite starts over.')
        return None

    def _check_same(self, seed, found):
        if differing := _differing(found['arguments'], self.arguments[seed]):
            raise InputError(
                f'{self.folder} holds a run with other arguments: {"; ".join(differing)}. Use another --snapshot-dir, '
                f'--resume {found["path"]} to go on from its weights and optimiser with these arguments, or '
                '--resume off --overwrite to start over.'
            )

    def _give_up(self, overwrite):
        present = [path for pattern in RUN_FILES for path in self.folder.glob(pattern)]
        if present and not overwrite:
            raise InputError(
                f'{self.folder} holds an earlier run ({some(sorted(path.name for path in present))}); --overwrite '
                'removes it, --resume auto continues it'
            )
        self._given_up = present


def _resumable(path, state):
    """What there is to know of a checkpoint that a run goes on from."""
    training = state['training']
    return {
        'path': str(path), 'arguments': training['arguments'], 'reopened': False,
        'epoch': training['progress']['epoch'], 'step': training.get('step', 0), 'records': training.get('records', 0),
    }  # fmt: skip


def _differing(earlier, now, names=None):
    """What is not the same in a run's arguments then and now, of all names that both have or of some of them."""
    return [
        f'{name} was {earlier[name]}, is {now[name]}'
        for name in sorted({*earlier} & {*now} & {*(names or now)})
        if earlier[name] != now[name]
    ]


def run_arguments(args, dtype, lists):
    """What a run depends on: its flags, precision, and the contents of its lists and base network, as plain values.

    Args:
        args (Namespace): the flags.
        dtype (torch.dtype): that --fp16 comes to on this processor.
        lists (dict): name -> path of a file.
    """
    flags = {name: _plain(value) for name, value in vars(args).items() if name not in EXECUTION_FLAGS}
    return flags | {'precision': name_of(dtype)} | digests(lists)


def digests(lists):
    """Digests of files' contents: 'content of NAME' for each name and path."""
    return {f'content of {name}': hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
            for name, path in lists.items()}  # fmt: skip


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
