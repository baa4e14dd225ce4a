"""How an interrupted run resumes: what its folder must hold, and when a run is refused.

A run saves its whole state in `last.pth` (`trainer.Trainer.save`); the file before it stays as `previous.pth`. The same
command, started again, finds these files here (`RunFolder`), checks that flags, classes, lists and base network are
those of the interrupted run, and hands the state to `trainer.Trainer.load_state`. Everything random is a function of
(seed, epoch, index), so a resumed run computes what an uninterrupted one would have, bit for bit on the CPU.

metrics.jsonl is written between saves. Each checkpoint says how many of its records it includes, and `RunFolder.keeps`
says which ones a resumed run keeps; later ones are made again.
"""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import InputError, some
from engine.checkpoint import of_seeds, read_content, read_state
from engine.config import check_config
from engine.distributed import barrier, on_main
from engine.precision import name_of
from model import MODELS

# Flags that say how a run is carried out; they may change when it resumes. Its result depends on the others only, apart
# from batch statistics of micro-batches, the half precision of kept features, and skipped images.
EXECUTION_FLAGS = {
    'accumulate', 'compile', 'data_dir', 'device', 'features', 'features_disk_gb', 'features_gb', 'fp16',
    'memory', 'num_workers', 'overwrite', 'print_frequency', 'recipe', 'resume', 'save_every_minutes',
    'save_every_steps', 'save_pred_every', 'select', 'skip_bad_images', 'snapshot_dir', 'support_list',
    'test_batch_size', 'timeout_minutes', 'train_list', 'val_list',
}  # fmt: skip
# What a run that resumes from a file (--resume FILE) must share with it: its network, optimiser and steps depend on it.
FIXED_FLAGS = (
    'dataset', 'fold', 'model', 'backbone', 'os', 'shot', 'batch_size', 'start_epoch', 'fix_bn',
    'freeze_backbone', 'filter_novel', 'content of training list', 'content of base network',
    *(name for method in MODELS.values() for name in method.OPTIONS),
)  # fmt: skip
# Flags that runs of earlier versions do not name, with the value that these had in effect.
LATER_FLAGS = {'views': 0, 'nested': False, 'support_labels': 'all', 'repeat_base_images': False}
VALIDATION_LIST = 'content of validation list'
CHECKPOINTS = ('last', 'previous', 'best')  # stage 2 appends the seed
RUN_FILES = (
    'last*.pth', 'last*.damaged', 'previous*.pth', 'best*.pth', 'best*.replaced', 'epoch_*.pth', 'metrics.jsonl',
    'log.txt', 'args.json', 'tb', 'features', 'memory.pt',
)  # fmt: skip


@dataclass
class SavedState:
    """Where one seed of a run resumes.

    Attributes:
        path: of the checkpoint.
        arguments: what the interrupted run depended on (`run_arguments`).
        progress: as `trainer.Trainer` stores it.
        step: optimisation steps done.
        records: how many records of metrics.jsonl the checkpoint includes.
        reopened: a finished run trains on (--resume FILE).
        has_best: the folder has the best checkpoint of the epochs done.
    """

    path: str
    arguments: dict
    progress: dict
    step: int
    records: int
    reopened: bool = False
    has_best: bool = False

    @classmethod
    def of(cls, path: Path | str, state: dict) -> 'SavedState':
        """Make it from a checkpoint that has been read (`checkpoint.read_state`)."""
        training = state['training']
        step, records = training.get('step', 0), training.get('records', 0)
        return cls(str(path), training['arguments'], training['progress'], step, records)


class RunFolder:
    """A snapshot folder, and where a run in it resumes.

    Args:
        folder: --snapshot-dir.
        arguments: seed -> what this run depends on (`run_arguments`); stored in its checkpoints. The seed is None in
            stage 1. Seeds may be added to a run later.
        resume: 'auto', 'off' or a checkpoint file.
        overwrite: unless 'auto': remove an earlier run.
        classes: of the fold (`Legend.classes`); a resumed run must have the same.

    Raises:
        InputError: the folder holds a run with other arguments, one of the other stage, or one that is not to be
            resumed; or the file is of another run. Nothing has been changed then.
    """

    def __init__(
        self, folder: Path, arguments: dict, resume: str = 'auto', overwrite: bool = False, classes: Sequence = ()
    ):
        self.folder, self.arguments, self.classes = Path(folder), arguments, classes
        self._to_remove = []  # files of an earlier run
        self._to_replace = []  # best checkpoints of what the file that the run resumes from does not know
        self._found: dict[int | None, SavedState] = on_main(lambda: self._find(resume, overwrite))

    def remove_earlier_run(self):
        """Delete the run that --overwrite replaces; call it after all checks have passed.

        A best checkpoint that belongs to epochs which --resume FILE drops, or to another validation list, is renamed to
        `best.replaced`.
        """
        barrier()  # every process has read what it starts from
        for path in self._to_remove:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self._to_replace:
            target, number = path.with_suffix('.replaced'), 2
            while target.exists():  # nothing that was saved is lost
                target, number = path.with_suffix(f'.{number}.replaced'), number + 1
            path.replace(target)
        self._to_remove, self._to_replace = [], []

    def state(self, seed: int | None = None) -> dict | None:
        """What `checkpoint.save_checkpoint` stored of a seed; None where the seed starts from the beginning."""
        found = self._found.get(seed)
        if not found:
            return None
        state = read_state(found.path)
        if found.reopened:
            state['training']['progress']['finished'] = False
        if not found.has_best:
            state['training']['progress'] |= {'best': None, 'best_epoch': state['epoch']}
        return state

    def holds(self, seed: int | None = None) -> bool:
        """Whether there is a state of this seed to resume from."""
        return seed in self._found

    def any_path(self) -> str | None:
        """A checkpoint with the base network that all states of this run share; None where there is no state."""
        return next((found.path for found in self._found.values()), None)

    def path(self, name: str | None = None, seed: int | None = None) -> Path:
        """FOLDER, FOLDER/name.pth, or FOLDER/name_{seed}.pth."""
        if name is None:
            return self.folder
        return self.folder / (f'{name}.pth' if seed is None else f'{name}_{seed}.pth')

    def keeps(self, record: dict) -> bool:
        """Whether a record of metrics.jsonl stays: of other seeds, and of what was done before this run resumes."""
        seed = record.get('seed')
        if seed not in self.arguments:
            return True
        if seed not in self._found:
            return False
        found = self._found[seed]
        is_done = record['epoch'] <= found.progress['epoch']
        return is_done or (record['kind'] == 'train' and record['step'] <= found.step)

    @property
    def records(self) -> dict[int | None, int]:
        """Seed -> how many records of what was done before metrics.jsonl must hold."""
        return {seed: found.records for seed, found in self._found.items()}

    def _find(self, resume, overwrite):
        """Seed -> SavedState."""
        self._check_stage()
        if resume == 'off':
            self._plan_removal(overwrite)
            return {}
        if resume != 'auto':
            return self._find_from_file(resume, overwrite)
        found = {seed: latest for seed in self.arguments if (latest := self._latest(seed))}
        for seed, latest in found.items():
            self._check_same(seed, latest)
            latest.has_best = self.path('best', seed).is_file()
        return found

    def _check_stage(self):
        """Refuse a folder of the other stage, also with --overwrite: its arguments and curves would be replaced."""
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

    def _find_from_file(self, path, overwrite):
        """Resume from a file, which this run's flags must fit; other seeds resume from their own files."""
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
        found[seed] = SavedState.of(path, state)
        for other, latest in found.items():  # all seeds of a run have the same flags
            latest.reopened = True
            if differing := _differing(latest.arguments, self.arguments[other], FIXED_FLAGS):
                raise InputError(
                    f'cannot resume from {latest.path}: its network, optimiser or steps do not fit '
                    f'({"; ".join(differing)}). Use --restore-from to start from its weights.'
                )
        if not self._contains(path):
            self._plan_removal(overwrite)
            found[seed].records = 0
            return found
        for other, latest in found.items():
            latest.has_best = self._check_best(other, latest)
        return found

    def _check_best(self, seed, found):
        """Whether the best checkpoint is the one that a state knows, by the same list; another is to be replaced."""
        path, progress = self.path('best', seed), found.progress
        if not path.is_file():
            return False
        with contextlib.suppress(InputError, KeyError, TypeError):  # a damaged or foreign one is replaced too
            best = read_content(path)
            # as text: what was not measured is NaN, which equals nothing
            known = str((best['epoch'], best['metrics'])) == str((progress['best_epoch'], progress['best']))
            if known and not _differing(found.arguments, self.arguments[seed], [VALIDATION_LIST]):
                return True
        self._to_replace.append(path)
        return False

    def _contains(self, path):
        """Whether a file is directly in this folder."""
        return Path(path).resolve().parent == self.folder.resolve()

    def _latest(self, seed):
        """SavedState of `last`, or of `previous` where `last` cannot be read; None where there is neither."""
        broken = {}
        for name in ('last', 'previous'):
            path = self.path(name, seed)
            if not path.is_file():
                continue
            try:
                state = read_state(path)
            except InputError as error:
                broken[path] = error
                continue
            for damaged, error in broken.items():
                print(f'warning: {error}\nwarning: resuming from {path}', flush=True)
                damaged.replace(damaged.with_suffix('.damaged'))  # else it would become `previous`
            check_config(path, state['config'], {'classes': self.classes})
            return SavedState.of(path, state)
        if broken:
            error = next(iter(broken.values()))
            raise InputError(f'{error} There is no earlier good checkpoint; --resume off --overwrite starts over.')
        return None

    def _check_same(self, seed, found):
        if differing := _differing(found.arguments, self.arguments[seed]):
            fits = not _differing(found.arguments, self.arguments[seed], FIXED_FLAGS)
            from_file = f'--resume {found.path} to resume from its weights and optimiser with these arguments, '
            raise InputError(
                f'{self.folder} holds a run with other arguments: {"; ".join(differing)}. Use another --snapshot-dir, '
                f'{from_file if fits else ""}or --resume off --overwrite to start over.'
            )

    def _plan_removal(self, overwrite):
        present = [path for pattern in RUN_FILES for path in self.folder.glob(pattern)]
        if present and not overwrite:
            raise InputError(
                f'{self.folder} holds an earlier run ({some(sorted(path.name for path in present))}); --overwrite '
                'removes it, --resume auto continues it'
            )
        self._to_remove = present


def _differing(earlier, now, names=None):
    """Descriptions of the arguments that differ, of all names that both have or of some of them.

    Of the validation list also where one has none.
    """
    earlier, now = ({VALIDATION_LIST: 'none'} | arguments for arguments in (LATER_FLAGS | earlier, now))
    return [
        f'{name} was {earlier[name]}, is {now[name]}'
        for name in sorted({*earlier} & {*now} & {*(names or now)})
        if earlier[name] != now[name]
    ]


def run_arguments(flags: dict, dtype: torch.dtype, files: dict[str, Path]) -> dict:
    """What a run depends on, as plain values: its flags, precision, and the contents of its lists and base network.

    Args:
        flags: name -> value.
        dtype: the precision that --fp16 selects on this device.
        files: name -> path.
    """
    plain = {name: _plain(value) for name, value in flags.items() if name not in EXECUTION_FLAGS}
    return plain | {'precision': name_of(dtype)} | digests(files)


def digests(files: dict[str, Path]) -> dict[str, str]:
    """Digests of files' contents: 'content of NAME' for each name and path."""
    return {f'content of {name}': hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
            for name, path in files.items()}  # fmt: skip


def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
