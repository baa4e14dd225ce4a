"""What a run leaves behind beside its checkpoints: args.json, log.txt, metrics.jsonl, tb/. The main process writes."""

import json
import math
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter

from utils.distributed import is_main
from utils.files import atomic_write


class RunLogger:
    """Logs to the terminal and to a run's folder.

    Args:
        folder (Path): the snapshot folder; made where it is missing. A later run of the same folder appends.
        arguments (dict): written to args.json.
    """

    def __init__(self, folder, arguments):
        self._tensorboard = None
        if is_main():
            self._folder = Path(folder)
            with atomic_write(self._folder / 'args.json') as file:
                json.dump(arguments, file, indent=2, default=str)
            self._tensorboard = SummaryWriter(str(self._folder / 'tb'))
            self.info(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {" ".join(sys.argv)}')

    def info(self, text):
        """Print text and append it to log.txt."""
        if is_main():
            print(text, flush=True)
            with open(self._folder / 'log.txt', 'a') as file:
                file.write(f'{text}\n')

    def record(self, kind, step, values, **position):
        """Append one JSON object to metrics.jsonl and its numbers to TensorBoard.

        Args:
            kind (str): 'train' or 'val'.
            step (int): optimisation steps so far.
            values (dict): name -> number; NaN and infinity become null.
            position: epoch, seed, ... stored alike but not drawn.
        """
        if not is_main():
            return
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self._folder / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps({'kind': kind, 'step': step, **position, **clean}) + '\n')
        run = f'{kind}_{position["seed"]}' if 'seed' in position else kind
        for name, value in clean.items():
            if value is not None:
                self._tensorboard.add_scalar(f'{run}/{name}', value, step)

    def close(self):
        """Flush TensorBoard."""
        if self._tensorboard:
            self._tensorboard.close()
