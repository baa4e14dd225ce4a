"""Exit code 0 where this Python satisfies requirements.txt; otherwise print what is missing.

python scripts/check_requirements.py
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def unsatisfied(lines):
    """What this environment lacks, one description per requirement."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ['packaging']
    lacking = []
    for line in lines:
        requirement = Requirement(line)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            lacking.append(str(requirement))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            lacking.append(f'{requirement} (found {installed})')
    return lacking


if __name__ == '__main__':
    if sys.version_info < (3, 10):
        sys.exit(f'Python >= 3.10 (found {sys.version.split()[0]})')
    text = (Path(__file__).parent.parent / 'requirements.txt').read_text()
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith('#')]
    if lacking := unsatisfied(lines):
        sys.exit('\n'.join(lacking))
