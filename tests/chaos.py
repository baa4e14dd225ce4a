"""Break training runs in the ways that machines fail, and report what happened and what was lost.

    python tests/chaos.py [--kills 20] [--only TEXT ...]

Embedded data, a small network, CPU; about a quarter of an hour on two cores. The disk-full fault needs the right to
mount a tmpfs and is skipped without it. Prints a table at the end; exits with code 1 if a fault lost more than is
allowed.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 2  # steps
DEADLINE = 300  # seconds that a run may take
COMMAND = (
    'train_base.py', '--dataset', 'shapes', '--backbone', 'resnet18', '--os', 32, '--num-workers', 1,
    '--base-size', '65,65', '--input-size', '65,65', '--print-frequency', 1, '--restore-from', 'none',
    '--batch-size', 12, '--num-epoch', 4, '--save-every-steps', SAVE_EVERY,
)  # fmt: skip


class Lost(Exception):
    """A fault lost more than is allowed."""


def kill(process):
    """Kill a process and all that it started, including stopped processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def check(condition, text):
    if not condition:
        raise Lost(text)


class Place:
    """A data set, an uninterrupted reference run, and folders for the other runs."""

    def __init__(self, folder):
        self.folder, self.started = Path(folder), []
        self.data = self.folder / 'data'
        make_shapes(self.data, seed=1, train_images=120, val_images=8)
        began = time.monotonic()
        self.reference = self.folder / 'reference'
        code, output = self.run(self.reference)
        check(code == 0, output)
        self.seconds = time.monotonic() - began
        self.per_epoch = int(re.search(r'step \d+/(\d+)', output)[1])

    def command(self, run, *flags, data=None, launch=(sys.executable,)):
        return [
            str(part) for part in (*launch, *COMMAND, '--data-dir', data or self.data, '--snapshot-dir', run, *flags)
        ]

    def start(self, run, *flags, **how):
        process = subprocess.Popen(
            self.command(run, *flags, **how), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        # a run that hangs is killed; the check of its output then fails
        watch = threading.Timer(DEADLINE, lambda: process.poll() is None and kill(process))
        watch.daemon = True
        watch.start()
        return process

    def run(self, run, *flags, **how):
        process = self.start(run, *flags, **how)
        output = process.communicate()[0]
        return process.returncode, output

    def end_all(self):
        """Kill the processes that a failed check has left running."""
        for process in self.started:
            kill(process)
            process.wait()
        self.started = []

    def finish(self, run):
        """Start the same command again, and expect the reference's weights and metrics.

        Returns:
            The output, and the number of finished steps that were lost.
        """
        done = self.steps_done(run)
        code, output = self.run(run)
        check(code == 0, output)
        lost = self.lost(done, output)
        for name in ('best.pth', 'last.pth'):
            ours, theirs = (torch.load(folder / name, weights_only=True)['model'] for folder in (run, self.reference))
            check(all(torch.equal(ours[key], theirs[key]) for key in theirs), f'{name} differs')
        same = (run / 'metrics.jsonl').read_bytes() == (self.reference / 'metrics.jsonl').read_bytes()
        check(same, 'metrics.jsonl differs')
        return output, lost

    def steps_done(self, run):
        """Steps of a run's latest log line, counted over all epochs."""
        log = run / 'log.txt'
        found = re.findall(r'epoch (\d+)/\d+ step (\d+)/', log.read_text()) if log.is_file() else []
        return (int(found[-1][0]) - 1) * self.per_epoch + int(found[-1][1]) if found else 0

    def lost(self, done, output):
        """The number of finished steps that a resumed run has lost, according to its output."""
        if 'finished earlier' in output:
            return 0
        resumed = re.search(r'resumed at epoch (\d+), step (\d+)', output)
        kept = (int(resumed[1]) - 1) * self.per_epoch + int(resumed[2]) - 1 if resumed else 0
        check(done - kept <= SAVE_EVERY, f'{done - kept} of {done} steps were lost')
        return max(done - kept, 0)

    def copy_of_data(self, name):
        shutil.copytree(self.data, self.folder / name)
        return self.folder / name

    def begun(self, name):
        """A copy of the reference run."""
        shutil.copytree(self.reference, self.folder / name)
        return self.folder / name


def killed(place, kills):
    rng, runs, done, early, lost = random.Random(0), 1, 0, 0, []
    run = place.folder / 'killed'
    while done < kills:
        before = place.steps_done(run)
        process = place.start(run)
        try:
            output = process.communicate(timeout=rng.uniform(0.1, place.seconds / 2))[0]
            check(process.returncode == 0, 'a run ended by itself')
            lost.append(place.lost(before, output))
            place.finish(run)
            runs, run = runs + 1, place.folder / f'killed{runs}'
        except subprocess.TimeoutExpired:
            kill(process)
            output = process.communicate()[0]
            if 'resumed at' in output:
                lost.append(place.lost(before, output))
            done += ' step ' in output
            early += ' step ' not in output
    lost.append(place.finish(run)[1])
    said = f'{done} kills while training and {early} while starting, in {runs} runs; same weights and metrics'
    return said, steps(max(lost))


def steps(lost):
    return f'{lost} step{"s" if lost > 1 else ""}, repeated' if lost else 'nothing'


def asked_to_stop(place, number):
    run = place.folder / f'signal{number}'
    process = place.start(run, '--save-every-steps', 0)
    for line in process.stdout:
        if 'epoch 2/4 step 2/' in line:
            process.send_signal(number)
            break
    process.communicate()
    check(process.returncode == 128 + number, f'exit code {process.returncode}')
    _, lost = place.finish(run)
    check(lost == 0, f'{lost} steps lost')
    return f'the run saved and exited with code {128 + number}; it resumed to the same weights', steps(lost)


def damaged(place, kind):
    run = place.begun(kind)
    path = run / 'last.pth'
    size = path.stat().st_size
    path.write_bytes(bytes(size) if kind == 'zeros' else path.read_bytes()[: size // 2])
    output, lost = place.finish(run)
    said = 'is empty inside' if kind == 'zeros' else 'is damaged: it ends early'
    check(f'{path} {said}' in output and 'previous.pth' in output, output)
    return 'the run named the file and resumed from previous.pth to the same weights', steps(lost)


def disk_full(place):
    run = place.folder / 'full'
    run.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=450m', 'tmpfs', str(run)]
    if subprocess.run(mount, capture_output=True).returncode:
        return 'skipped: no right to mount a tmpfs', '-'
    try:
        code, output = place.run(run)
        check(code == 1 and 'cannot write' in output and 'Traceback' not in output, output)
        torch.load(run / 'last.pth', weights_only=True)
        subprocess.run(['mount', '-o', 'remount,size=4g', str(run)], check=True)
        _, lost = place.finish(run)
    finally:
        subprocess.run(['umount', str(run)], check=True)
    return 'the run stopped with a message; once there was room, it resumed to the same weights', steps(lost)


def bad_image(place, skip):
    data = place.copy_of_data('skip_data' if skip else 'bad_data')
    path = data / 'JPEGImages' / 'train_0007.jpg'  # of the fold's training list; its header is whole
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = place.folder / ('skip' if skip else 'bad')
    code, output = place.run(run, *(['--skip-bad-images'] if skip else []), data=data)
    check(str(path) in output and 'Traceback' not in output, output)
    if skip:
        check(code == 0 and '1 training images were skipped' in output, output)
        return 'the run listed and counted it, and continued', 'this image'
    check(code == 1, output)
    _, lost = place.finish(run)  # with the undamaged data
    return 'the run stopped and named it; once the image was repaired, it resumed to the same weights', steps(lost)


def hanging_process(place):
    run = place.folder / 'hang'
    launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    process = place.start(run, '--timeout-minutes', 0.25, launch=launch)
    children = []
    for line in process.stdout:
        if 'epoch 2/4 step 3/' in line:
            listed = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True, check=True)
            children = [int(pid) for pid in listed.stdout.split()]
            os.kill(children[-1], signal.SIGSTOP)
            break
    began = time.monotonic()
    for line in process.stdout:
        if ' ends: ' in line:
            break
    else:
        raise Lost('no process reported that it ends')
    seconds = time.monotonic() - began
    check(children and seconds < 60, f'the others waited for {seconds:.0f} s')
    rest = process.stdout.read()
    check(process.wait() != 0, rest)
    done = place.steps_done(run)
    code, output = place.run(run, '--timeout-minutes', 0.25, launch=launch)
    check(code == 0 and 'resumed at epoch 2' in output, output)
    lost = place.lost(done, output)
    what = f'the other processes ended after {seconds:.0f} s (--timeout-minutes 0.25) and said so; the run resumed'
    return what, steps(lost)


def not_a_number(place):
    state = torch.load(place.reference / 'best.pth', weights_only=True)
    state['model']['base_emb'][:] = float('nan')
    torch.save(state, place.folder / 'nan.pth')
    run = place.folder / 'nan'
    code, output = place.run(run, '--restore-from', place.folder / 'nan.pth')
    check(code == 1 and 'loss is not finite at epoch 1, step 1' in output and 'train_' in output, output)
    check(not list(run.glob('*.pth')), 'weights that are not finite were saved')
    return "the run stopped and named the batch's images; it saved nothing", 'nothing'


def changed_list(place):
    data = place.copy_of_data('list_data')
    run = place.folder / 'list'
    check(place.run(run, data=data)[0] == 0, 'the first run failed')
    before = {path: path.read_bytes() for path in run.glob('*.pth')}
    path = data / 'list' / 'val.txt'
    path.write_text('\n'.join(path.read_text().split()[1:]) + '\n')
    code, output = place.run(run, data=data)
    check(code == 1 and 'content of validation list' in output, output)
    check(before == {path: path.read_bytes() for path in run.glob('*.pth')}, 'checkpoints changed')
    return 'the run was refused, and the list named', 'nothing'


def two_in_one_folder(place):
    run = place.folder / 'two'
    first = place.start(run)
    for line in first.stdout:
        if 'epoch 1/4 step 1/' in line:
            break
    code, output = place.run(run)
    check(code == 1 and 'in use by another run' in output, output)
    first.communicate()
    check(first.returncode == 0, 'the first run failed')
    place.finish(run)
    return 'the second was refused, the first continued', 'nothing'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--only', nargs='+', help='faults whose names hold one of these texts')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        faults = {
            'SIGTERM': lambda: asked_to_stop(place, signal.SIGTERM),
            'SIGINT': lambda: asked_to_stop(place, signal.SIGINT),
            'last.pth truncated': lambda: damaged(place, 'truncated'),
            'last.pth full of zeros': lambda: damaged(place, 'zeros'),
            'disk full': lambda: disk_full(place),
            'unreadable image': lambda: bad_image(place, skip=False),
            'unreadable image, --skip-bad-images': lambda: bad_image(place, skip=True),
            'a process hangs': lambda: hanging_process(place),
            'loss is not a number': lambda: not_a_number(place),
            'list changed between runs': lambda: changed_list(place),
            'two runs in one folder': lambda: two_in_one_folder(place),
            'SIGKILL at random moments': lambda: killed(place, args.kills),
        }
        rows, failed = [('fault', 'what happened', 'what was lost')], False
        for name, fault in faults.items():
            if args.only and not any(text in name for text in args.only):
                continue
            try:
                rows.append((name, *fault()))
            except Exception as error:  # a failed check does not stop the other faults
                rows.append((name, f'FAILED: {str(error)[-2000:]}', '?'))
                failed = True
                place.end_all()
            print(*rows[-1], sep=': ', flush=True)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows.insert(1, tuple('-' * width for width in widths))
    for row in rows:
        print('| ' + ' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + ' |')
    sys.exit(failed)


if __name__ == '__main__':
    main()
