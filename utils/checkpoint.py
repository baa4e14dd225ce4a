"""Say what a checkpoint is, and write its weights alone.

    python -m utils.checkpoint runs/5shot/best_123.pth
    python -m utils.checkpoint runs/5shot/best_123.pth --to best_123.safetensors
    python -m utils.checkpoint theirs.pth --extract --to theirs.safetensors

Reads checkpoints of this project and of others: files of torch.save, safetensors. What --to writes can be given to
--restore-from. It keeps the weights and what they are for, without the state of training.

Files with Python objects beside their weights, or with a whole pickled network, are refused by all scripts: loading
them would run code of theirs. With --extract, placeholders stand for these objects, so that no such code runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError, exits_cleanly, some
from engine.checkpoint import Checkpoint, read_checkpoint, resolve_checkpoint, write_weights
from engine.metrics import SUMMARY
from model import MODELS, find_backbone
from report.tables import markdown_table
from utils.cli import make_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('file', type=Path, help='a checkpoint, or the folder of a run: its best.pth')
    parser.add_argument('--to', type=Path, metavar='OUT', help='write the weights to OUT.safetensors or OUT.pth')
    parser.add_argument('--entry', metavar='NAME', help='the entry that holds the weights, where a file has several')
    parser.add_argument(
        '--extract', action='store_true', help='read files with foreign Python objects too, without running their code'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT where it exists')
    args = parser.parse_args(argv)
    if args.to and args.to.suffix not in ('.safetensors', '.pth'):
        parser.error(f'--to {args.to}: expected a name that ends with .safetensors or .pth')
    return args


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint is: titles with texts."""
    config, metrics = checkpoint.config, checkpoint.metrics
    rows = {'file': f'{checkpoint.path}, {Path(checkpoint.path).stat().st_size / 1e6:.1f} MB'}
    backbone = find_backbone(checkpoint.state, 'backbone.' if checkpoint.holds_network else '')
    try:
        counts = checkpoint.class_counts
    except InputError:
        counts = None
    if counts:
        base, novel = counts
        title = MODELS[checkpoint.model].title
        rows['network'] = f'{title}, stage {2 if novel else 1}: {base} base and {novel} novel classes'
        classes = [f'{name} ({class_id})' for class_id, name in config.get('classes', ())]
        rows |= {'base classes': ', '.join(classes[:base]), 'novel classes': ', '.join(classes[base : base + novel])}
    else:
        rows['network'] = 'a backbone, perhaps with a classifier' if backbone else 'not of this project'
    rows['backbone'] = backbone or 'none of this project'
    for title, key in (('data set', 'dataset'), ('fold', 'fold'), ('shot', 'shot'), ('seed', 'seed'),
                       ('output stride', 'os')):  # fmt: skip
        rows[title] = str(config.get(key, ''))
    rows['base size'] = ','.join(map(str, config.get('base_size', ())))
    rows['scale range'] = ','.join(map(str, config.get('scale_range', ())))
    rows['epoch'] = str(checkpoint.epoch or '')
    means = {title: metrics[key] for key, title in SUMMARY.items() if metrics.get(key, -1) >= 0}  # without NaN
    rows['mIoU in %'] = ', '.join(f'{title} {mean:.2f}' for title, mean in means.items())
    if 'taught' in config:
        rows['mIoU in %'] += ', on the base views that it was trained on'
    if 'images' in metrics:
        rows['mIoU in %'] += f', on {metrics["images"]} of {metrics["listed_images"]} images'
    rows['entries'] = some([f'{name} ({kind})' for name, kind in checkpoint.entries.items()], 12)
    return {title: text for title, text in rows.items() if text}


def parts(checkpoint: Checkpoint) -> str:
    """Markdown table of the tensors of each part, the first component of their names."""
    names = [name.partition('.')[0] for name in checkpoint.state]
    lines = []
    for part in dict.fromkeys(names):
        tensors = [tensor for name, tensor in zip(names, checkpoint.state.values(), strict=True) if name == part]
        kinds = sorted({str(tensor.dtype).removeprefix('torch.') for tensor in tensors})
        lines.append([part, str(len(tensors)), f'{sum(tensor.numel() for tensor in tensors):,}', ', '.join(kinds)])
    return markdown_table(['part', 'tensors', 'values', 'types'], lines)


@exits_cleanly
def main(args: argparse.Namespace):
    if args.to and args.to.exists() and not args.overwrite:
        raise InputError(f'{args.to} exists; give another name, or --overwrite')
    path = resolve_checkpoint(args.file) if args.file.is_dir() else args.file
    checkpoint = read_checkpoint(path, args.entry, args.extract)
    rows = describe(checkpoint)
    width = max(map(len, rows))
    for title, text in rows.items():
        print(f'{title:<{width}}  {text}')
    print(f'\n{parts(checkpoint)}')
    if args.to:
        write_weights(args.to, checkpoint)
        print(f'\nwrote {args.to}, {len(checkpoint.state)} tensors')


if __name__ == '__main__':
    main(parse_args())
