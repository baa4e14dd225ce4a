"""Prove the CUDA path on a GPU: one table of PASS and FAIL, with figures, in about 20 minutes.

    python benchmarks/gpu.py [--only PART ...] [--json FILE] [--size 473] [--data-dir VOC2012]

Each part takes under 10 minutes. Parts run in order of importance; one that breaks is reported and the next one goes
on. Scripts run on the embedded data set. Validations and loading use the photographs of a folder in VOC's layout, or
drawn ones of the same size. Exit code 0 if everything passes, 1 if not, 3 on a machine without a GPU, where the parts
are only listed.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_checks, gpu_speed
from benchmarks.class_index import SPEC
from benchmarks.gpu_cases import Row, Setting
from engine.distributed import process_group

PARTS = {
    'smoke': gpu_checks.smoke,
    'overflow': gpu_checks.overflow,
    'reference': gpu_checks.reference_forms,
    'golden': gpu_checks.golden_curve,
    'precision': gpu_checks.precisions,
    'evaluation': gpu_checks.evaluations,
    'synchronisation': gpu_checks.synchronisations,
    'speed': gpu_speed.speed,
    'validation': gpu_speed.validation_speed,
    'profile': gpu_speed.profile,
    'resume': gpu_checks.resuming,
    'compile': gpu_checks.compiling,
    'processes': gpu_checks.processes,
    'memory': gpu_checks.out_of_memory,
    'loading': gpu_speed.loading,
}


def run_parts(names: list[str], setting: Setting) -> Iterator[Row]:
    """Run parts, and print and yield their rows as they are found; an exception ends its part with a row that fails."""
    for name in names:
        began = time.perf_counter()
        for row in _guarded(PARTS[name], setting):
            limit = '' if row.limit is None else f'<= {row.limit:g}'
            verdict = '' if row.limit is None else 'PASS' if row.passed else 'FAIL'
            print(f'{name:16} {row.name:80} {row.value:12.5g} {row.unit:8} {limit:10} {verdict}', flush=True)
            yield row
        print(f'{name:16} took {time.perf_counter() - began:.0f} s', flush=True)


def _guarded(part, setting):
    try:
        yield from part(setting)
    except Exception:  # whatever one part meets, the others are still worth their time
        traceback.print_exc()
        yield Row('the part raised an exception', 1, 0)


def as_json(row: Row) -> dict:
    """A row in types that JSON knows: a value that is not finite becomes null."""
    return asdict(row) | {'passed': row.passed, 'value': float(row.value) if math.isfinite(row.value) else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART', help=', '.join(PARTS))
    parser.add_argument('--json', type=Path, help='write the rows to this file')
    parser.add_argument('--size', type=int, default=473, help='side of images in pixels (default: 473)')
    parser.add_argument('--data-dir', type=Path, help="photographs and masks in VOC's layout (default: drawn ones)")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f'--json: there is no folder {args.json.parent}')
    if args.data_dir and not (args.data_dir / SPEC.masks['train']).is_dir():
        parser.error(f'--data-dir: there is no folder {args.data_dir / SPEC.masks["train"]}')
    if not torch.cuda.is_available():
        print('PyTorch finds no GPU here. On one, these parts would run:')
        for name in args.only:
            print(f'  {name:16} {PARTS[name].__doc__.splitlines()[0]}')
        return 3
    with tempfile.TemporaryDirectory() as folder, process_group('cuda') as device:
        about = {'device': torch.cuda.get_device_name(device), 'pytorch': torch.__version__}
        print(', PyTorch '.join(about.values()), flush=True)
        rows = []
        for row in run_parts(args.only, Setting(device, args.size, Path(folder), args.data_dir)):
            rows.append(row)
            if args.json:  # after every row, so that a run that is stopped leaves what it found
                args.json.write_text(json.dumps(about | {'rows': list(map(as_json, rows))}, indent=2))
    failed = [row.name for row in rows if not row.passed]
    print(f'{len(rows)} rows, {len(failed)} failed' + ''.join(f'\n  {name}' for name in failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
