"""Commands that build on each other: run some at a time, each once, and go on after an interruption."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from core import signals
from core.files import atomic_write, parse_json
from core.parallel import usable_cores

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A command, and those that it builds on.

    Attributes:
        name: name in messages.
        script: what it runs; the key in sweep.json.
        command: argument vector.
        folder: gets its output, and the sweep.json that says whether it is done.
        after: the steps that must be done first.
    """

    name: str
    script: str
    command: tuple[str, ...]
    folder: Path
    after: tuple['Step', ...] = ()

    def notes(self) -> dict[str, dict]:
        """Content of sweep.json: script -> 'command' and 'seconds'."""
        path = self.folder / 'sweep.json'
        return parse_json(path.read_bytes(), path) if path.is_file() else {}

    def done(self) -> bool:
        """Whether exactly this command has succeeded, and so have those that it builds on."""
        same = self.notes().get(self.script, {}).get('command') == list(self.command)
        return same and all(step.done() for step in self.after)

    def note(self, seconds: float):
        """Record in sweep.json that the command has succeeded."""
        with atomic_write(self.folder / 'sweep.json') as file:
            json.dump(
                self.notes() | {self.script: {'command': self.command, 'seconds': round(seconds)}}, file, indent=2
            )


def run(steps: list[Step], jobs: int, when_done: Callable[[Step], None]) -> list[Step]:
    """Run steps, each after those that it builds on.

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
            ready = [step for step in waiting if not {*step.after} & {*waiting, *running, *failed}]
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
    """Environment variables of job number `slot`: they give it its share of the GPUs and of the cores."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': path}
    listed = os.environ.get('CUDA_VISIBLE_DEVICES')
    devices = listed.split(',') if listed else [str(i) for i in range(torch.cuda.device_count())]
    if devices and jobs > 1:
        env['CUDA_VISIBLE_DEVICES'] = ','.join(devices[slot::jobs] or [devices[slot % len(devices)]])
    if jobs > 1:
        env.setdefault('OMP_NUM_THREADS', str(max(usable_cores() // jobs, 1)))
    return env
