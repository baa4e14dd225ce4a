"""Train and evaluate on a grid of data sets, folds, shots and seeds, and write the paper's table.

    python -m utils.sweep --data voc=VOC2012 --shot 1 5 10 --seed 123 234 345 --out runs/voc \\
        --base-flags="--restore-from resnet50_v2.pth" --novel-flags="--fix-lr --update-base"

One base network is trained for each fold. Stage 2 starts from it for each shot, with all seeds in one run. Run the same
command again to resume: commands that are done are skipped, and interrupted runs resume. --flags, --base-flags etc. are
passed on to the scripts.

Writes the runs to OUT/DATASET_foldF/base and OUT/DATASET_foldF/Kshot, each with console.txt (output) and sweep.json
(commands that are done). Writes after each evaluation OUT/table.md and table.tex (mean ± standard deviation over seeds)
and OUT/table.csv (one row for each seed, with its run's folder).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from core import signals
from core.errors import InputError, exits_cleanly
from core.files import atomic_write, check_writable, parse_json
from core.parallel import usable_cores
from dataset.classes import find_dataset
from engine.checkpoint import DEFAULT_MODEL
from model import MODELS
from report.sweep_tables import read_results, write_tables
from utils.cli import add_seeds, make_parser, not_negative, positive
from utils.data_flags import check_folds

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One command of the sweep.

    Attributes:
        name: name in messages.
        script: train_base, gen_fs_list, ft_pop or test; the key in sweep.json.
        command: argument vector.
        folder: gets its output, and the sweep.json that says whether it is done.
        after: the step that must be done first, or None.
    """

    name: str
    script: str
    command: tuple[str, ...]
    folder: Path
    after: 'Step | None' = None

    def notes(self) -> dict[str, dict]:
        """Content of sweep.json: script -> 'command' and 'seconds'."""
        path = self.folder / 'sweep.json'
        return parse_json(path.read_bytes(), path) if path.is_file() else {}

    def done(self) -> bool:
        """Whether exactly this command has succeeded, and so have those that it builds on."""
        same = self.notes().get(self.script, {}).get('command') == list(self.command)
        return same and (self.after is None or self.after.done())

    def note(self, seconds: float):
        """Record in sweep.json that the command has succeeded."""
        with atomic_write(self.folder / 'sweep.json') as file:
            json.dump(
                self.notes() | {self.script: {'command': self.command, 'seconds': round(seconds)}}, file, indent=2
            )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        '--data', nargs='+', required=True, metavar='NAME=DIR|CARD', help='data sets and their folders'
    )  # fmt: skip
    parser.add_argument('--fold', type=not_negative, nargs='+', default=(0, 1, 2, 3), help='default: 0 1 2 3')
    parser.add_argument('--shot', type=positive, nargs='+', default=(1, 5), help='default: 1 5')
    add_seeds(parser, '--seed', 'default: 123 234 345', (123, 234, 345))
    parser.add_argument('--out', type=Path, required=True, help='folder of all runs and of the tables')
    parser.add_argument('--model', choices=list(MODELS), default=DEFAULT_MODEL, help=f'default: {DEFAULT_MODEL}')
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='commands to run at a time (default: 1)')
    parser.add_argument(
        '--nproc', type=positive, default=1, metavar='N',
        help="processes of train_base.py and test.py (default: 1); stage 2, with its batch of 1, always has one",
    )  # fmt: skip
    parser.add_argument('--train-list', help='train list of all commands; for one data set only')
    for name, whose in (
        ('--flags', 'all three scripts'),
        ('--training-flags', 'train_base.py and ft_pop.py'),
        ('--base-flags', 'train_base.py, e.g. --restore-from'),
        ('--novel-flags', 'ft_pop.py'),
        ('--test-flags', 'test.py'),
    ):
        parser.add_argument(
            name, type=shlex.split, action='extend', default=[], metavar='"FLAG ..."',
            help=f'flags of {whose}; may be repeated',
        )  # fmt: skip
    parser.add_argument(
        '--shot-flags', action='append', default=[], metavar='"SHOT=FLAG ..."',
        help='flags of ft_pop.py for one number of shots, e.g. "5=--num-epoch 200"',
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_grid(parser, args)
    return args


def check_grid(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuse a grid that does not fit together; turn --data and --shot-flags into dicts."""
    data = {}
    for pair in args.data:
        name, _, folder = pair.partition('=')
        try:
            spec = find_dataset(name)
        except InputError as error:
            parser.error(f'--data {pair}: {error}')
        if not (folder or spec.root):
            parser.error(f'--data {pair}: expected {spec}=DIR')
        check_folds(parser, spec, args.fold)
        if not spec.tested().val_list:
            parser.error(f'--data {pair}: {spec} has no images to evaluate (val: none)')
        data[spec.name] = ['--dataset', spec.choice, '--data-dir', folder or str(spec.root)]
    args.data = data
    try:
        pairs = [(positive(shot), flags) for shot, _, flags in (text.partition('=') for text in args.shot_flags)]
    except argparse.ArgumentTypeError as error:
        parser.error(f'--shot-flags: {error}')
    args.shot_flags = {shot: [] for shot in args.shot}
    for shot, flags in pairs:
        if shot not in args.shot_flags:
            parser.error(f'--shot-flags {shot}={flags}: --shot has {", ".join(map(str, args.shot))}')
        args.shot_flags[shot] += shlex.split(flags)
    if args.train_list and len(args.data) > 1:
        parser.error('--train-list can be given for one data set only')


def plan(args: argparse.Namespace) -> list[Step]:
    """Plan the grid: for each fold the base network, and for each of its shots the lists, stage 2 and evaluation.

    Returns:
        Each step after the one that it builds on.
    """
    python = [sys.executable]
    launch = [*python, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', args.nproc]
    together = launch if args.nproc > 1 else python
    seeds = ','.join(map(str, args.seed))
    # only where it is not the default, so that commands of earlier sweeps stay the same
    model = ['--model', args.model] if args.model != DEFAULT_MODEL else []
    steps = []

    def add(name, script, folder, after, *command):
        steps.append(Step(name, script, tuple(map(str, command)), folder, after))
        return steps[-1]

    for dataset, flags in args.data.items():
        for fold in args.fold:
            data = [*flags, *(['--train-list', args.train_list] if args.train_list else [])]
            name, base = f'{dataset} fold {fold}', args.out / f'{dataset}_fold{fold}' / 'base'
            shared = [*data, '--fold', fold, *model, *args.flags]
            trained = add(
                f'{name}, base', 'train_base', base, None, *together, ROOT / 'train_base.py', *shared,
                *args.training_flags, '--snapshot-dir', base, *args.base_flags,
            )  # fmt: skip
            for shot in args.shot:
                folder = base.parent / f'{shot}shot'
                few_shot = ['--shot', shot, '--random-seed', seeds]
                listed = add(
                    f'{name}, {shot}-shot, lists', 'gen_fs_list', folder, trained, *python, '-m', 'utils.gen_fs_list',
                    *data, '--fold', fold, '--shot', shot, '--seed', *args.seed,
                )  # fmt: skip
                taught = add(
                    f'{name}, {shot}-shot', 'ft_pop', folder, listed, *python, ROOT / 'ft_pop.py', *shared,
                    *args.training_flags, *few_shot, '--restore-from', base, '--snapshot-dir', folder,
                    *args.novel_flags, *args.shot_flags.get(shot, ()),
                )  # fmt: skip
                add(
                    f'{name}, {shot}-shot, evaluation', 'test', folder, taught, *together, ROOT / 'test.py', *shared,
                    *few_shot, '--restore-from', folder, *args.test_flags,
                )  # fmt: skip
    return steps


def run(steps: list[Step], jobs: int, when_done: Callable[[Step], None]) -> list[Step]:
    """Run steps, each after the one that it builds on.

    Args:
        steps: those that are not done yet.
        jobs: how many may run at a time.
        when_done: called with each step that has succeeded.

    Returns:
        The steps that failed.

    Raises:
        Stopped: SIGTERM or SIGINT arrived; running commands have saved their state.
    """
    waiting, running, failed = list(steps), {}, []
    try:
        while waiting or running:
            ready = [step for step in waiting if step.after not in (*waiting, *running, *failed)]
            free = [slot for slot in range(jobs) if slot not in (entry[1] for entry in running.values())]
            for step, slot in zip(ready, free, strict=False):
                waiting.remove(step)
                print(f'{step.name}: {shlex.join(step.command)}', flush=True)
                running[step] = (start(step, environment(slot, jobs)), slot, time.monotonic())
            if not running:
                break  # what is waiting builds on failed steps
            time.sleep(0.2)
            signals.raise_if_received()
            for step in [step for step, (process, *_) in running.items() if process.poll() is not None]:
                process, _, began = running.pop(step)
                if succeeded(step, process.returncode, time.monotonic() - began):
                    when_done(step)
                else:
                    failed.append(step)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


def succeeded(step: Step, code: int, seconds: float) -> bool:
    """Record a command that ended with exit code 0; of any other, print the last lines of its output."""
    if code == 0:
        step.note(seconds)
        print(f'{step.name}: done in {timedelta(seconds=round(seconds))}', flush=True)
    else:
        console = step.folder / 'console.txt'
        output = console.read_text(errors='replace').rpartition(f'$ {shlex.join(step.command)}\n')[2]
        tail = '\n'.join(output.splitlines()[-5:])
        print(f'{step.name}: FAILED with exit code {code}, see {console}\n{tail}', flush=True)
    return code == 0


def start(step: Step, env: dict[str, str]) -> subprocess.Popen:
    """Start a step's command with its output in console.txt."""
    step.folder.mkdir(parents=True, exist_ok=True)
    with open(step.folder / 'console.txt', 'a') as console:
        print(f'$ {shlex.join(step.command)}', file=console, flush=True)
        return subprocess.Popen(step.command, env=env, stdout=console, stderr=subprocess.STDOUT)


def environment(slot: int, jobs: int) -> dict[str, str]:
    """Environment variables of job number `slot`: they give it its share of the GPUs, or of the cores."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': path}
    listed = os.environ.get('CUDA_VISIBLE_DEVICES')
    devices = listed.split(',') if listed else [str(i) for i in range(torch.cuda.device_count())]
    if devices and jobs > 1:
        env['CUDA_VISIBLE_DEVICES'] = ','.join(devices[slot::jobs] or [devices[slot % len(devices)]])
    elif jobs > 1:
        env.setdefault('OMP_NUM_THREADS', str(max(usable_cores() // jobs, 1)))
    return env


def update_tables(steps: list[Step], out: Path, folds: list[int]):
    """Write the tables of the evaluations that are done, if any."""
    evaluated = [step.folder for step in steps if step.script == 'test' and step.done()]
    if rows := read_results(evaluated, out):
        write_tables(out, rows, folds)


@exits_cleanly
def main(args: argparse.Namespace):
    args.out = args.out.resolve()
    check_writable(args.out)
    signals.listen()
    steps = plan(args)
    left = [step for step in steps if not step.done()]
    print(f'{len(steps)} commands, {len(steps) - len(left)} of them done before', flush=True)

    def update(step):
        if step.script == 'test':
            update_tables(steps, args.out, args.fold)

    try:
        failed = run(left, args.jobs, update)
    finally:
        update_tables(steps, args.out, args.fold)
    if (args.out / 'table.md').is_file():
        print((args.out / 'table.md').read_text())
    if failed:
        raise InputError(f'{len(failed)} commands failed: {"; ".join(step.name for step in failed)}')


if __name__ == '__main__':
    main(parse_args())
