"""Say what this Python lacks of a requirements file; exit code 0 where it lacks nothing.

    python scripts/check_requirements.py requirements.txt
    python scripts/check_requirements.py --list requirements.txt               # what pip should install on this machine
    python scripts/check_requirements.py --list --headless requirements.txt    # the same, with OpenCV without windows

Any distribution of OpenCV satisfies the requirement `opencv-python` if it can be imported. `opencv-python` itself
cannot where the system's libGL.so.1 is missing, as on most servers; `--list` then names `opencv-python-headless`.
"""

from __future__ import annotations

import sys
from pathlib import Path

MIN_PYTHON = (3, 10)
OPENCV = 'opencv-python'


def read_requirements(path: Path) -> list[str]:
    """The requirements of a file and of the files that it includes with `-r`, one per item."""
    requirements = []
    for line in path.read_text(encoding='utf-8').splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            requirements += read_requirements(path.parent / line[3:].strip())
        elif line:
            requirements.append(line)
    return requirements


def headless(requirement: str) -> str:
    """The same requirement with `opencv-python-headless` in place of `opencv-python`."""
    return f'{OPENCV}-headless{requirement[len(OPENCV) :]}' if requirement.startswith(OPENCV) else requirement


def lacks_libgl() -> bool:
    """Whether this is a Linux without the OpenGL library that `opencv-python` needs."""
    import ctypes

    if not sys.platform.startswith('linux'):
        return False
    try:
        ctypes.CDLL('libGL.so.1')
    except OSError:
        return True
    return False


def opencv_version() -> str | None:
    """The version of OpenCV; None where there is none.

    Raises:
        Exception: OpenCV is installed but cannot be imported.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        if error.name == 'cv2':
            return None
        raise
    return getattr(cv2, '__version__', None)  # an uninstalled OpenCV can leave an empty folder that still imports


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None where it is missing. Raises whatever importing OpenCV raises."""
    from importlib.metadata import PackageNotFoundError, version

    if name == OPENCV:
        return opencv_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unsatisfied(requirements: list[str]) -> list[str]:
    """What this environment lacks, one description per requirement."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ['packaging']
    lacking = []
    for requirement in map(Requirement, requirements):
        try:
            found = installed_version(requirement.name)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            lacking.append(f'{requirement} (installed, but cannot be imported: {reason})')
            continue
        if found is None:
            lacking.append(str(requirement))
        elif not requirement.specifier.contains(found, prereleases=True):
            lacking.append(f'{requirement} (found {found})')
    return lacking


def main(arguments: list[str]) -> None:
    """Check or list; the options come first."""
    requirements = [item for name in arguments if not name.startswith('--') for item in read_requirements(Path(name))]
    if '--list' in arguments:
        if '--headless' in arguments or lacks_libgl():
            requirements = [headless(requirement) for requirement in requirements]
        print('\n'.join(requirements))
        return
    if sys.version_info < MIN_PYTHON:
        sys.exit(f'Python >= 3.10 (found {sys.version.split()[0]})')
    lacking = unsatisfied(requirements)
    if lacking:
        sys.exit('\n'.join(lacking))


if __name__ == '__main__':
    main(sys.argv[1:])
