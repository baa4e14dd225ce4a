"""The set-up of the environment, with a pip that installs stubs: no network, and a project folder of scripts only."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m venv` and `python -m pip` for a Python whose packages are those in the folder `site` beside its `bin`
FAKE = r"""
import os, re, shutil, signal, sys, time
from pathlib import Path

program, arguments, settings = Path(sys.argv[1]), sys.argv[2:], os.environ.get('FAKE', '').split()
site = program.parent.parent / 'site'
OPENCV = "import os\nif {name!r} in os.environ['BROKEN'].split():\n    raise ImportError('libGL.so.1: not found')\n"

def note(text):
    with open(os.environ['FAKE_LOG'], 'a') as log:
        log.write(text + '\n')

def venv(options, folder):
    if 'no-venv' in settings:
        sys.exit('No module named venv')
    if '--clear' in options:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ('bin', 'site'):
        (folder / name).mkdir(parents=True)
    shutil.copy(program, folder / 'bin' / 'python')
    if '--without-pip' in options:
        return
    if 'no-ensurepip' in settings:
        sys.exit('ensurepip is not available')
    install('pip')

def install(name, version='1'):
    (site / f'{name}-{version}.dist-info').mkdir()
    (site / f'{name}-{version}.dist-info' / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
    if name == 'pip':
        (site / 'pip').mkdir()
        (site / 'pip' / '__init__.py').write_text('')
    if name == 'packaging':
        (site / 'packaging').symlink_to(os.environ['PACKAGING'])
    if name.startswith('opencv'):
        (site / 'cv2.py').write_text(OPENCV.format(name=name) + f'__version__ = {version!r}\n')

def pip(command, options):
    if not any((Path(folder) / 'pip').is_dir() for folder in (site, *os.environ.get('PYTHONPATH', '').split(':'))):
        sys.exit('No module named pip')
    if command == 'install' and '--requirement' in options:
        for line in Path(options[-1]).read_text().split():
            name, version = re.match(r'([\w-]+)[>=]+([\d.]+)', line).groups()
            if list(site.glob(f'{name}-*.dist-info')):
                continue
            if 'slow' in settings:
                time.sleep(0.1)
            if 'killed' in settings and name == 'tabulate':
                os.kill(os.getppid(), signal.SIGKILL)
                sys.exit(1)
            if 'offline' in settings:
                sys.exit(f'no matching distribution for {name}')
            install(name, version)
            note(name)
    elif command == 'install':
        install(options[-1])
        note(options[-1])
    elif command == 'uninstall':
        for name in options:
            for folder in site.glob(f'{name}-[0-9]*.dist-info'):
                shutil.rmtree(folder)
                (site / 'cv2.py').unlink(missing_ok=True)
                note(f'no {name}')

arguments = [item for item in arguments if item not in ('--quiet', '--disable-pip-version-check')]
if arguments[:2] == ['-m', 'venv']:
    folder = Path(arguments[-1])
    options, site = arguments[2:-1], folder / 'site'
    venv(options, folder)
elif arguments[:2] == ['-m', 'pip']:
    pip(arguments[2], arguments[3:])
"""
WRAPPER = """#!/bin/sh
if [ "$1" = -m ]; then exec {python} -S {folder}/fake.py "$0" "$@"; fi
export PYTHONPATH="$(dirname "$0")/../site:{folder}/stubs"
exec {python} -S "$@"
"""
CTYPES = "def CDLL(name):\n    if {missing}:\n        raise OSError(f'{{name}}: cannot open shared object file')\n"


class Machine:
    """A folder with a project of scripts only, a Python with pip in its PATH, and settings of what is missing."""

    def __init__(self, folder):
        self.folder = folder
        self.project = folder / 'project'
        self.log = folder / 'log'
        shutil.copytree(ROOT / 'scripts', self.project / 'scripts')
        (self.project / 'requirements.txt').write_text('opencv-python>=4.11\npackaging>=23  # why\ntabulate>=0.9\n')
        (self.project / 'requirements-dev.txt').write_text('-r requirements.txt\npytest>=8\n')
        (folder / 'go.sh').write_text(
            'set -eu\nsource project/scripts/setup_env.sh "$1"\necho "uses $(command -v python)"\n'
        )
        (folder / 'fake.py').write_text(FAKE)
        self.make_python(folder / 'system', 'python')
        self.make_python(folder / 'system', 'python3')
        (folder / 'system/site/pip').mkdir()
        (folder / 'system/site/pip/__init__.py').touch()
        self.libgl(True)

    def make_python(self, env, name):
        """A Python without packages."""
        for part in ('bin', 'site'):
            (env / part).mkdir(parents=True, exist_ok=True)
        program = env / 'bin' / name
        program.write_text(WRAPPER.format(python=sys.executable, folder=self.folder))
        program.chmod(0o755)

    def libgl(self, there):
        """Whether the dynamic linker finds libGL.so.1."""
        (self.folder / 'stubs').mkdir(exist_ok=True)
        (self.folder / 'stubs/ctypes.py').write_text(CTYPES.format(missing=not there))

    def environment(self, fake='', broken='', **more):
        """Variables of a process; `fake`: what goes wrong, `broken`: distributions of OpenCV that do not import."""
        return {
            'PATH': f'{self.folder}/system/bin:/usr/bin:/bin', 'HOME': str(self.folder / 'home'), 'FAKE': fake,
            'BROKEN': broken, 'FAKE_LOG': str(self.log), 'PACKAGING': str(Path(packaging.__file__).parent),
            **more,
        }  # fmt: skip

    def pip(self, *requirements):
        """Install stubs into the active environment, without a note in the log."""
        (self.folder / 'list').write_text('\n'.join(requirements))
        command = [self.folder / 'system/bin/python', '-m', 'pip', 'install', '--requirement', self.folder / 'list']
        subprocess.run(command, check=True, env=self.environment() | {'FAKE_LOG': os.devnull})

    def start(self, requirements='requirements.txt', preexec=None, **settings):
        """A process that sources the set-up."""
        return subprocess.Popen(
            ['bash', 'go.sh', requirements], cwd=self.folder, env=self.environment(**settings), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=preexec,
        )  # fmt: skip

    def set_up(self, *args, **settings):
        """Run the set-up; returns (exit code, output)."""
        process = self.start(*args, **settings)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def installed(self):
        """What pip has done since the last call, in order."""
        done = self.log.read_text().split('\n')[:-1] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return done


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


ALL = ['opencv-python', 'packaging', 'tabulate']
HEADLESS = ['opencv-python-headless', 'packaging', 'tabulate']


def test_the_active_environment_is_used_where_it_satisfies_the_file(machine):
    machine.pip('opencv-python>=4.11', 'packaging>=23', 'tabulate>=0.9')
    code, output = machine.set_up()
    assert code == 0 and output == f'uses {machine.folder}/system/bin/python\n' and machine.installed() == []
    code, output = machine.set_up('requirements-dev.txt')
    assert code == 0 and 'the active Python lacks: pytest>=8\n' in output, output
    assert f'uses {machine.project}/.venv/bin/python' in output and machine.installed() == [*ALL, 'pytest']


def test_what_is_installed_once_is_used_and_completed(machine):
    code, output = machine.set_up()
    assert code == 0 and 'the active Python lacks: packaging\n' in output and machine.installed() == ALL, output
    code, output = machine.set_up()
    assert code == 0 and output == f'uses {machine.project}/.venv/bin/python\n' and machine.installed() == []
    code, output = machine.set_up('requirements-dev.txt')
    assert code == 0 and machine.installed() == ['pytest'], output


@pytest.mark.parametrize(('script', 'more'), (('demo.sh', []), ('run_tests.sh', ['pytest'])))
def test_running_needs_less_than_testing(machine, script, more):
    process = subprocess.run(
        ['bash', machine.project / 'scripts' / script], env=machine.environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode != 0  # the project has neither train_base.py nor ruff
    assert machine.installed() == ALL + more, process.stdout + process.stderr


def test_the_headless_opencv_is_installed_without_libgl(machine):
    machine.libgl(False)
    code, output = machine.set_up(broken='opencv-python')
    assert code == 0 and machine.installed() == HEADLESS, output


@pytest.mark.parametrize('name', ('opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless'))
def test_any_opencv_that_can_be_imported_satisfies(machine, name):
    machine.pip(f'{name}>=4.12', 'packaging>=23', 'tabulate>=0.9')
    code, output = machine.set_up()
    assert code == 0 and machine.installed() == [], output


def test_an_opencv_of_another_version_does_not_satisfy(machine):
    machine.pip('opencv-python-headless>=4.10', 'packaging>=23', 'tabulate>=0.9')
    code, output = machine.set_up()
    assert code == 0 and 'lacks: opencv-python>=4.11 (found 4.10)' in output and machine.installed() == ALL


def test_an_opencv_that_cannot_be_imported_is_named_and_replaced(machine):
    machine.pip('opencv-python>=4.11', 'packaging>=23', 'tabulate>=0.9')
    machine.set_up('requirements-dev.txt')
    assert machine.installed() == [*ALL, 'pytest']
    machine.libgl(False)  # the folder was copied to a server
    code, output = machine.set_up(broken='opencv-python')
    assert code == 0 and 'installed, but cannot be imported: libGL.so.1: not found' in output, output
    assert machine.installed() == ['no opencv-python', 'opencv-python-headless']


def test_the_headless_opencv_is_the_second_try_where_another_library_is_missing(machine):
    code, output = machine.set_up(broken='opencv-python')
    assert code == 0 and machine.installed() == [*ALL, 'no opencv-python', 'opencv-python-headless'], output


def test_if_no_opencv_can_be_imported_the_reason_is_reported(machine):
    code, output = machine.set_up(broken='opencv-python opencv-python-headless')
    assert code == 1 and 'still lacks: opencv-python>=4.11 (installed, but cannot be imported: libGL' in output, output


def test_pip_comes_from_the_base_python_where_there_is_no_ensurepip(machine):
    code, output = machine.set_up(fake='no-ensurepip')
    assert code == 0 and machine.installed() == ['pip', *ALL], output


@pytest.mark.parametrize('missing', ('no-venv', 'no-ensurepip'))
def test_the_package_is_named_where_no_environment_can_be_made(machine, missing):
    if missing == 'no-ensurepip':
        shutil.rmtree(machine.folder / 'system/site/pip')
    code, output = machine.set_up(fake=missing)
    assert code == 1 and 'apt-get install python3-venv' in output and machine.installed() == [], output
    assert {'no-venv': 'No module named venv', 'no-ensurepip': 'ensurepip is not available'}[missing] in output


def test_an_environment_with_a_missing_python_is_made_again(machine):
    machine.set_up()
    machine.installed()
    (machine.project / '.venv/bin/python').unlink()
    (machine.project / '.venv/bin/python').symlink_to('/no/python')
    code, output = machine.set_up()
    assert code == 0 and machine.installed() == ALL, output


def test_no_python_at_all(machine):
    for program in ('dirname', 'bash', 'paste', 'sed'):
        (machine.folder / 'tools').mkdir(exist_ok=True)
        (machine.folder / 'tools' / program).symlink_to(shutil.which(program))
    code, output = machine.set_up(PATH=str(machine.folder / 'tools'))
    assert code == 1 and 'no Python >= 3.10 found' in output, output


def without_the_rights_of_root():
    """Let permissions of files count for root too; for a process to be started."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def read_only(machine):
    machine.project.chmod(0o555)
    probe = subprocess.run(['test', '-w', machine.project], preexec_fn=without_the_rights_of_root)
    if probe.returncode == 0:
        pytest.skip('this user may write to read-only folders')
    yield machine
    machine.project.chmod(0o755)


def test_a_read_only_checkout_has_its_environment_in_the_cache(read_only):
    cache = read_only.folder / 'cache'
    for installed in (ALL, []):
        code, output = read_only.set_up(preexec=without_the_rights_of_root, XDG_CACHE_HOME=str(cache))
        assert code == 0 and f'uses {cache}/pop-' in output and read_only.installed() == installed, output
        assert ('is read-only; the environment goes to' in output) == bool(installed)
    assert not (read_only.project / '.venv').exists()
    code, output = read_only.set_up(preexec=without_the_rights_of_root)
    assert code == 0 and f'uses {read_only.folder}/home/.cache/pop-' in output


def test_a_read_only_checkout_and_no_cache(read_only):
    nowhere = read_only.project / 'scripts/check_requirements.py'
    code, output = read_only.set_up(preexec=without_the_rights_of_root, XDG_CACHE_HOME=str(nowhere))
    assert code == 1 and 'set XDG_CACHE_HOME' in output and read_only.installed() == []


def test_of_two_at_once_one_installs_and_one_waits(machine):
    processes = [machine.start(fake='slow') for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert machine.installed() == ALL
    assert sum('another set-up is running; waiting' in output for output in outputs) == 1, outputs
    assert sum('installing requirements.txt' in output for output in outputs) == 1, outputs


def test_an_interrupted_installation_is_finished(machine):
    code, output = machine.set_up(fake='killed')
    assert code == -9 and machine.installed() == ALL[:2], output
    code, output = machine.set_up()
    assert code == 0 and 'finishing the interrupted installation' in output, output
    assert machine.installed() == ALL[2:]
    code, output = machine.set_up()
    assert 'finishing' not in output and machine.installed() == []


def test_an_installation_that_failed_says_why_and_can_be_continued(machine):
    code, output = machine.set_up(fake='offline')
    assert code == 1 and 'no matching distribution for opencv-python' in output
    assert 'error: pip could not install' in output and 'uses' not in output
    code, output = machine.set_up()
    assert code == 0 and machine.installed() == ALL, output
