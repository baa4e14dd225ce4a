"""Run the method on a grid of data sets, folds, shots and seeds, and write a paper's table.

    python -m utils.sweep --data voc=VOC2012 --shot 1 5 10 --seed 123 234 345 --out runs/voc \\
        --base-flags="--restore-from resnet50_v2.pth" --novel-flags="--fix-lr --update-base"

One base network is trained for each fold; stage 2 starts from it for each shot, with all seeds in one run. The same
command again skips what is finished and goes on with what was interrupted. Flags of the scripts are handed on.

Writes OUT/DATASET_foldF/base and OUT/DATASET_foldF/Kshot (the runs, each with console.txt and sweep.json: the commands
that are done), and after each evaluation OUT/table.md, table.tex (mean ± standard deviation over seeds) and table.csv
(one row for each seed, with the folder that it comes from).
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from core import signals
from core.errors import InputError, exits_cleanly
from core.files import atomic_write, check_writable
from core.parallel import usable_cores
from dataset import DATASETS
from engine.metrics import SUMMARY
from report.tables import markdown_table, mean_and_std
from utils.cli import add_seeds, check_folds, make_parser, not_negative, positive

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ('base', 'novel', 'total', 'harmonic')


@dataclass(frozen=True)
class Step:
    """One command of the sweep.

    Attributes:
        name: what it is, for messages.
        script: the note's key: train_base, gen_fs_list, ft_pop or test.
        command: its argument vector.
        folder: gets its output, and the note that it is done.
        after: the step that must be done before, or None.
    """

    name: str
    script: str
    command: tuple
    folder: Path
    after: 'Step | None' = None

    def notes(self):
        """What sweep.json of the folder says: script -> 'command' and 'seconds'."""
        path = self.folder / 'sweep.json'
        return json.loads(path.read_text()) if path.is_file() else {}

    def done(self):
        """Whether just this command has ended well, on top of what it builds on."""
        same = self.notes().get(self.script, {}).get('command') == list(self.command)
        return same and (self.after is None or self.after.done())

    def note(self, seconds):
        """Write down that the command has ended well."""
        with atomic_write(self.folder / 'sweep.json') as file:
            json.dump(
                self.notes() | {self.script: {'command': self.command, 'seconds': round(seconds)}}, file, indent=2
            )


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('--data', nargs='+', required=True, metavar='DATASET=DIR', help='data sets and their folders')
    parser.add_argument('--fold', type=not_negative, nargs='+', default=(0, 1, 2, 3), help='default: 0 1 2 3')
    parser.add_argument('--shot', type=positive, nargs='+', default=(1, 5), help='default: 1 5')
    add_seeds(parser, '--seed', 'default: 123 234 345', (123, 234, 345))
    parser.add_argument('--out', type=Path, required=True, help='folder of all runs and of the tables')
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='commands at a time (default: 1)')
    parser.add_argument(
        '--nproc', type=positive, default=1, metavar='N',
        help="processes of train_base.py and test.py (default: 1); stage 2's batch of 1 is for one",
    )  # fmt: skip
    parser.add_argument('--train-list', help='of the three scripts and the few-shot lists; with one data set only')
    for name, whose in (
        ('--flags', 'all three scripts'),
        ('--training-flags', 'train_base.py and ft_pop.py'),
        ('--base-flags', 'train_base.py, --restore-from among them'),
        ('--novel-flags', 'ft_pop.py'),
        ('--test-flags', 'test.py'),
    ):
        parser.add_argument(
            name, type=shlex.split, action='extend', default=[], metavar='"FLAG ..."',
            help=f'flags of {whose}; may be given again',
        )  # fmt: skip
    parser.add_argument(
        '--shot-flags', action='append', default=[], metavar='"SHOT=FLAG ..."',
        help='flags of ft_pop.py for one number of shots, e.g. "5=--num-epoch 200"',
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.data = dict(pair.split('=', 1) if '=' in pair else (pair, '') for pair in args.data)
    for name, folder in args.data.items():
        if name not in DATASETS or not folder:
            parser.error(f'--data {name}={folder}: expected DATASET=DIR with one of {", ".join(DATASETS)}')
        check_folds(parser, DATASETS[name], args.fold)
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
        parser.error('--train-list goes with one data set')
    return args


def plan(args):
    """The steps of the grid: base network, lists, and for each shot stage 2 and its evaluation.

    Returns:
        list of Step: in an order that may be kept; the last one of each run is its evaluation.
    """
    python = [sys.executable]
    launch = [*python, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', args.nproc]
    together = launch if args.nproc > 1 else python
    seeds = ','.join(map(str, args.seed))
    steps = []

    def add(name, script, folder, after, *command):
        steps.append(Step(name, script, tuple(map(str, command)), folder, after))
        return steps[-1]

    for dataset, data_dir in args.data.items():
        for fold in args.fold:
            data = ['--dataset', dataset, '--data-dir', data_dir]
            data += ['--train-list', args.train_list] if args.train_list else []
            name, base = f'{dataset} fold {fold}', args.out / f'{dataset}_fold{fold}' / 'base'
            shared = [*data, '--fold', fold, *args.flags]
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


def run(steps, jobs, when_done):
    """Run steps, each after the one that it builds on, so many at a time.

    Args:
        steps (list of Step): those that are not done yet.
        jobs (int): at most so many at a time.
        when_done (callable): called with each step that ended well.

    Returns:
        list of Step: those that failed.

    Raises:
        Stopped: SIGTERM or SIGINT; the commands that ran have saved their state.
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
                break  # the others build on failed ones
            time.sleep(0.2)
            if signals.asked():
                raise signals.Stopped(signals.asked())
            for step in [step for step, (process, *_) in running.items() if process.poll() is not None]:
                process, _, began = running.pop(step)
                if ended_well(step, process.returncode, time.monotonic() - began):
                    when_done(step)
                else:
                    failed.append(step)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


def ended_well(step, code, seconds):
    """Note a command that ended with code 0; tell of any other what it said last."""
    if code == 0:
        step.note(seconds)
        print(f'{step.name}: done in {timedelta(seconds=round(seconds))}', flush=True)
    else:
        console = step.folder / 'console.txt'
        said = console.read_text(errors='replace').rpartition(f'$ {shlex.join(step.command)}\n')[2]
        tail = '\n'.join(said.splitlines()[-5:])
        print(f'{step.name}: FAILED with exit code {code}, see {console}\n{tail}', flush=True)
    return code == 0


def start(step, env):
    """Start a step's command; its output goes to console.txt."""
    step.folder.mkdir(parents=True, exist_ok=True)
    with open(step.folder / 'console.txt', 'a') as console:
        print(f'$ {shlex.join(step.command)}', file=console, flush=True)
        return subprocess.Popen(step.command, env=env, stdout=console, stderr=subprocess.STDOUT)


def environment(slot, jobs):
    """Environment of one of several jobs: its share of the GPUs, or of the cores."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': path}
    listed = os.environ.get('CUDA_VISIBLE_DEVICES')
    devices = listed.split(',') if listed else [str(i) for i in range(torch.cuda.device_count())]
    if devices and jobs > 1:
        env['CUDA_VISIBLE_DEVICES'] = ','.join(devices[slot::jobs] or [devices[slot % len(devices)]])
    elif jobs > 1:
        env.setdefault('OMP_NUM_THREADS', str(max(usable_cores() // jobs, 1)))
    return env


def collect(out, steps):
    """What the evaluations found.

    Returns:
        list of dict: for each seed 'dataset', 'fold', 'shot', 'seed', the keys of `SUMMARY` in percent, 'checkpoint'
        and 'run', the folder relative to `out`.
    """
    rows = []
    for step in steps:
        path = step.folder / 'results.json'
        if step.script != 'test' or not step.done() or not path.is_file():
            continue
        content = json.loads(path.read_text())
        for seed, result in content['seeds'].items():
            means = {key: float('nan') if result[key] is None else result[key] for key in SUMMARY}
            place = {'dataset': content['dataset'], 'fold': content['fold'], 'shot': content['shot'], 'seed': int(seed)}
            rows.append({**place, **means, 'checkpoint': Path(result['checkpoint']).name,
                         'run': os.path.relpath(step.folder, out)})  # fmt: skip
    return rows


def table_lines(rows, folds):
    """The paper's table.

    Args:
        rows (list of dict): of `collect`, of one data set.
        folds (sequence of int): of the whole grid.

    Returns:
        list of list of str: method, shot, fold, then `COLUMNS` as mean ± standard deviation over seeds, run folder. The
        row of all folds, where all are there, is the mean and deviation over seeds of each seed's mean over folds.
    """
    lines = []
    for shot in sorted({row['shot'] for row in rows}):
        of_shot = [row for row in rows if row['shot'] == shot]
        for fold in folds:
            of_fold = [row for row in of_shot if row['fold'] == fold]
            cells = [mean_and_std([row[key] for row in of_fold]) if of_fold else '-' for key in COLUMNS]
            lines.append(['POP', f'{shot}', f'{fold}', *cells, of_fold[0]['run'] if of_fold else '-'])
        seeds = sorted({row['seed'] for row in of_shot})
        cells = []
        for key in COLUMNS:
            values = [[row[key] for row in of_shot if row['seed'] == seed] for seed in seeds]
            complete = all(len(of_seed) == len(folds) for of_seed in values)
            cells.append(mean_and_std([np.mean(of_seed) for of_seed in values]) if complete else '-')
        if len(folds) > 1:
            lines.append(['POP', f'{shot}', 'mean', *cells, ''])
    return lines


def write_tables(out, rows, folds):
    """Write table.md, table.tex and table.csv."""
    markdown, latex = [], []
    for dataset in dict.fromkeys(row['dataset'] for row in rows):
        of_dataset = [row for row in rows if row['dataset'] == dataset]
        lines = table_lines(of_dataset, folds)
        seeds = ', '.join(map(str, sorted({row['seed'] for row in of_dataset})))
        header = ['method', 'shot', 'fold', *(SUMMARY[key] for key in COLUMNS), 'run']
        title = f'{dataset}: mIoU in %, mean ± standard deviation over seeds {seeds}'
        markdown.append(f'{title}\n\n{markdown_table([header, *lines])}\n')
        latex.append(latex_table(title, header[:-1], [line[:-1] for line in lines]))
    with atomic_write(out / 'table.md') as file:
        file.write('\n'.join(markdown))
    with atomic_write(out / 'table.tex') as file:
        file.write('\n'.join(latex))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out / 'table.csv') as file:
        file.write(text.getvalue())


def latex_table(title, header, lines):
    """A LaTeX table (package booktabs), with a rule under each number of shots."""

    def escaped(text):
        return re.sub(r'([%_&#$])', r'\\\1', text).replace('±', r'$\pm$')

    body = []
    for i, line in enumerate(lines):
        if i and line[1] != lines[i - 1][1]:
            body.append(r'\midrule')
        body.append(' & '.join(map(escaped, line)) + r' \\')
    rows = '\n'.join(body)
    return (
        '% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n'
        f'\\caption{{{escaped(title)}}}\n\\begin{{tabular}}{{lrr{"c" * (len(header) - 3)}}}\n\\toprule\n'
        f'{" & ".join(header)} \\\\\n\\midrule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n'
    )


@exits_cleanly
def main(argv=None):
    args = parse_args(argv)
    args.out = args.out.resolve()
    check_writable(args.out)
    signals.listen()
    steps = plan(args)
    left = [step for step in steps if not step.done()]
    print(f'{len(steps)} commands, {len(steps) - len(left)} of them done before', flush=True)

    def update(step=None):
        if (step is None or step.script == 'test') and (rows := collect(args.out, steps)):
            write_tables(args.out, rows, args.fold)

    try:
        failed = run(left, args.jobs, update)
    finally:
        update()
    if (args.out / 'table.md').is_file():
        print((args.out / 'table.md').read_text())
    if failed:
        raise InputError(f'{len(failed)} commands failed: {"; ".join(step.name for step in failed)}')


if __name__ == '__main__':
    main()
