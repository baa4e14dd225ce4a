"""What a run leaves behind beside its checkpoints: args.json, log.txt, metrics.jsonl, tb/. The main process writes."""

import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.files import TEXT, atomic_write, json_ready
from core.names import printable
from core.ranks import is_main
from engine.resume import RunFolder

# modules with a SummaryWriter, and how its `add_hparams` calls the name of a run
TENSORBOARD_WRITERS = {'tensorboardX': 'name', 'torch.utils.tensorboard': 'run_name'}


class RunLogger:
    """Logs to the terminal and to a run's folder.

    Args:
        path: the snapshot folder; made where it is missing.
        arguments: written to args.json.
        folder: says which records of metrics.jsonl stay: those made after the checkpoint that a run resumes from are
            made again. Without it all are removed.
    """

    def __init__(self, path: Path, arguments: dict, folder: RunFolder | None = None):
        self._tensorboard = None
        self._records = Counter()  # of metrics.jsonl, by seed
        if is_main():
            self._folder = Path(path)
            with atomic_write(self._folder / 'args.json') as file:
                json.dump(arguments, file, indent=2, default=str)
            self._keep_records(folder)
            self.info(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {" ".join(sys.argv)}')
            self._tensorboard = self._open_tensorboard()

    def info(self, text: str, terminal: bool = True):
        """Append text to log.txt; print it too, unless a progress bar shows it (`terminal=False`)."""
        if is_main():
            if terminal:
                tqdm.write(text)  # above a progress bar, where there is one
                sys.stdout.flush()
            with open(self._folder / 'log.txt', 'a', **TEXT) as file:
                file.write(f'{text}\n')

    def _open_tensorboard(self):
        """A SummaryWriter of tensorboardX or of PyTorch; None where neither can be imported: no run fails for that."""
        reasons = []
        for module in TENSORBOARD_WRITERS:
            try:
                return importlib.import_module(module).SummaryWriter(str(self._folder / 'tb'))
            except Exception as error:  # packages that do not fit each other fail in many ways
                reasons.append(f'{module}: {type(error).__name__}: {error}')
        self.info(f'note: no TensorBoard files, as no writer can be imported ({"; ".join(reasons)})')
        return None

    def _keep_records(self, folder):
        """Remove the other records from metrics.jsonl."""
        path = self._folder / 'metrics.jsonl'
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = []
        for line in lines:
            record = _parsed(line)
            if folder and record and folder.keeps(record):
                kept.append(line)
                self._records[record.get('seed')] += 1
        for seed, count in folder.records.items() if folder else ():
            if self._records[seed] < count:
                print(f'warning: {path} lacks records of what was done before', flush=True)
        if kept != lines or not path.is_file():
            with atomic_write(path, 'wb') as file:
                file.writelines(kept)

    def sync_records(self, seed: int | None) -> int:
        """Flush all records to disk; returns how many there are of a seed, 0 in processes other than the main one."""
        if is_main():
            with open(self._folder / 'metrics.jsonl', 'a') as file:
                os.fsync(file.fileno())
        return self._records[seed]

    def record(
        self, kind: str, step: int, values: dict, timing: dict | None = None, iou: dict | None = None, **position
    ):
        """Append one JSON object to metrics.jsonl and its numbers to TensorBoard.

        The file holds nothing that depends on the clock: runs that compute the same have the same.

        Args:
            kind: 'train' or 'val'.
            step: optimisation steps so far.
            values: name -> number; NaN and infinity become null.
            timing: name -> number; for TensorBoard only.
            iou: class name -> IoU in percent.
            position: epoch, seed, ...; stored too, but not drawn.
        """
        if not is_main():
            return
        clean, clean_iou = json_ready(values), json_ready(iou or {})
        with open(self._folder / 'metrics.jsonl', 'a') as file:
            nested = {'iou': clean_iou} if iou else {}
            file.write(json.dumps({'kind': kind, 'step': step, **position, **clean, **nested}) + '\n')
        self._records[position.get('seed')] += 1
        scalars = clean | (timing or {}) | {f'iou/{name}': value for name, value in clean_iou.items()}
        for name, value in scalars.items():
            if self._tensorboard and value is not None:
                self._tensorboard.add_scalar(f'{_tag(kind, position)}/{name}', value, step)

    def picture(self, name: str, picture: np.ndarray, step: int, **position):
        """Show a picture, uint8 [H, W, 3], in TensorBoard."""
        if self._tensorboard:
            self._tensorboard.add_image(_tag(name, position), picture, step, dataformats='HWC')

    def hyperparameters(self, arguments: dict, metrics: dict, **position):
        """Show the arguments of a finished run beside its metrics (name -> number) in TensorBoard."""
        if self._tensorboard:
            plain = {name: value if isinstance(value, (bool, int, float)) else printable(str(value))
                     for name, value in (arguments | position).items()}  # fmt: skip
            numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}
            name = TENSORBOARD_WRITERS[type(self._tensorboard).__module__.removesuffix('.writer')]
            self._tensorboard.add_hparams(plain, numbers, **{name: _tag('hparams', position)})

    def close(self):
        """Flush TensorBoard."""
        if self._tensorboard:
            self._tensorboard.close()


def _parsed(line):
    """A record of metrics.jsonl, or None where a line is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {'kind', 'epoch', 'step'} <= record.keys() else None


def _tag(name, position):
    """Name of a curve or picture; each seed of stage 2 has its own."""
    return f'{name}_{position["seed"]}' if 'seed' in position else name
