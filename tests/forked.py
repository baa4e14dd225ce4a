"""The scripts in processes of their own, forked from a server that has imported them and done nothing else.

A new interpreter needs five seconds of a core to import PyTorch. A fork has its own arguments, output and process
group, and can be killed. What it shares with other forks is the order of sets of strings: where a test is about the
same results of two runs, one of them is `run_new`.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ('train_base', 'ft_pop', 'test', 'utils.gen_fs_list', 'utils.predict', 'utils.sweep')
ONE_THREAD = {'OMP_NUM_THREADS': '1'}
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([*SCRIPTS, 'torch._dynamo', 'tensorboardX'])


class Forked:
    """One or several processes that run a script together; like `subprocess.Popen` with one pipe for what they print.

    Args:
        command: a script or '-m' and a module, then flags.
        processes: how many; several find each other as under torchrun, but nobody restarts or ends them.
    """

    def __init__(self, *command, processes=1):
        with mock.patch.dict(os.environ, ONE_THREAD | {'PYTHONPATH': str(ROOT)}):
            multiprocessing.forkserver.ensure_running()
        reader, writer = CONTEXT.Pipe(duplex=False)
        command = [str(part) for part in command]
        self._processes = [
            CONTEXT.Process(target=_run, args=(command, {**os.environ, **ONE_THREAD, **ranks}, writer))
            for ranks in _ranks(processes)
        ]
        for process in self._processes:
            process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    def send_signal(self, number):
        """Send a signal to the process, or to each of several, but not to what they have started."""
        for process in self._processes:
            os.kill(process.pid, number)

    def kill(self):
        """Kill the processes and all that they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self):
        """Close the output and wait for the end.

        Returns:
            The exit code, of several processes the one farthest from 0; negative: the signal that ended it.
        """
        self.stdout.close()
        for process in self._processes:
            process.join()
        return max((process.exitcode for process in self._processes), key=abs)


def run_process(*command, timeout=240, processes=1):
    """Run a script as `Forked` does, for `timeout` seconds at most; returns (exit code, output)."""
    process = Forked(*command, processes=processes)
    watch = threading.Timer(timeout, process.kill)
    watch.start()
    output = process.stdout.read()
    watch.cancel()
    return process.wait(), output


def run_new(*command):
    """As `run_process`, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, timeout=240, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    return done.returncode, done.stdout


def _ranks(processes):
    """Environment variables of each process, as torchrun sets them."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    common = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)}
    common |= dict.fromkeys(('WORLD_SIZE', 'LOCAL_WORLD_SIZE'), str(processes))
    return [common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(processes)]


def _run(command, environment, output):
    """Become the process of a command."""
    os.setpgid(0, 0)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', 1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    numpy.random.seed()  # not that of other forks
    try:
        if command[0] == '-m':
            sys.argv = command[1:]
            sys.modules.pop(command[1], None)
            runpy.run_module(command[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter; `multiprocessing` does not
