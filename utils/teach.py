"""Teach a trained network classes of your own from a few photographs.

    python -m utils.teach --restore-from runs/voc_base --support my_photos --out runs/scooter
    python -m utils.teach --restore-from runs/scooter --support more_photos --out runs/scooter_and_bin
    python -m utils.teach --restore-from runs/scooter_and_bin --forget scooter --out runs/bin

--support has a folder for each class, named after it: my_photos/scooter/IMG_1.jpg with its mask IMG_1.png, in which
any pixel that is not zero is the class; or it holds a card, dataset.yaml, of masks that show several classes. The base
network is one of stage 1, or one that was taught before: its classes stay, and all are trained together. Base data need
not be at hand if memory.pt is beside the checkpoint (train_base.py and utils.memory write it).

Writes to --out: best.pth, which utils.predict takes; memory.pt, from which it can be taught more; teach.json; and
panels/*.png, the photographs with what the network says of them.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core import IGNORE_INDEX
from core.errors import InputError, exits_cleanly, some
from core.files import check_writable
from core.ranks import world_size
from dataset import FoldData
from dataset.legend import Legend
from dataset.own_classes import SupportImage, SupportSamples, doubts, extend_legend, read_support_folder
from engine.checkpoint import Checkpoint, read_checkpoint, resolve_checkpoint, save_checkpoint
from engine.described import described_data_set, described_network, taught_classes
from engine.distributed import process_group
from engine.evaluation import evaluate
from engine.feature_store import digest
from engine.features import FeatureKeeper, KeptFeatures
from engine.memory import (
    NAME,
    Memory,
    keeper_in_memory,
    look_at_base,
    read_memory,
    teachable,
    write_memory,
)
from engine.metrics import iou_per_class, summarize
from engine.precision import name_of, precision
from engine.teaching import Teacher, TrainingSettings
from engine.weights import SUFFIXES
from model import JointPOP, build_model
from report.teaching import draw_panel, teaching_table, write_teaching
from utils import cli, from_flags

TAUGHT_MODEL = 'pspnet_joint'  # row of `model.MODELS` of `JointPOP`
STEPS = 150
LEAST_IOU, MOST_LOST = 25, 5  # a class below this IoU on its own photographs was not learned; points of base mIoU


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument('--restore-from', required=True, help='the network: a checkpoint or the folder of a run')
    parser.add_argument('--support', type=Path, help='photographs with masks: a sub-folder for each class, or a card')
    parser.add_argument('--forget', nargs='+', default=[], metavar='NAME', help='classes taught before, to be removed')
    parser.add_argument('--out', type=Path, required=True, help='folder of the results')
    parser.add_argument('--overwrite', action='store_true', help='replace what an earlier run wrote to --out')
    group = parser.add_argument_group('base data')
    group.add_argument('--memory', type=Path, help='memory of the network (default: memory.pt beside the checkpoint)')
    group.add_argument('--data-dir', type=Path, help='base data, used instead of the base views in the memory')
    group.add_argument('--train-list', type=Path, help="with --data-dir: training ids (default: the data set's)")
    group.add_argument(
        '--memory-mb', type=cli.rate,
        help='with --data-dir: size of the base views (default: 300, or one view of each class)',
    )  # fmt: skip
    group = parser.add_argument_group('training')
    group.add_argument('--views', type=cli.positive, default=50, help='views of each class (default: 50)')
    group.add_argument(
        '--scale-range', type=cli.parse_range, default=(0.5, 2.0), metavar='LO,HI',
        help='random resize factor of the views, relative to the size that fits (default: 0.5,2)',
    )  # fmt: skip
    group.add_argument(
        '--steps', type=cli.positive, help=f'default: {STEPS} and as many for each novel class, so {2 * STEPS} for one'
    )
    group.add_argument(
        '--learning-rate', type=cli.rate, default=1e-3, help='the head has ten times this rate (default: 1e-3)'
    )
    group.add_argument('--batch-size', type=cli.positive, default=1, help='pairs of views per step (default: 1)')
    group.add_argument('--seed', type=cli.not_negative, default=123, help='of all random draws (default: 123)')
    group.add_argument(
        '--leave-out', action=argparse.BooleanOptionalAction, default=True,
        help='measure the IoU on photographs that are left out in turn (default: on)',
    )  # fmt: skip
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)
    if world_size() > 1:
        parser.error('it runs in one process; start it without torchrun')
    if args.out.resolve() == cli.folder_of(Path(args.restore_from).resolve()):
        parser.error(f'--out {args.out} is the folder of --restore-from; give another one')
    if not args.support and not args.forget:
        parser.error('give --support, --forget, or both')
    if not args.data_dir and (args.memory_mb or args.train_list):
        parser.error('--memory-mb and --train-list are about the base data of --data-dir, which is not given')
    return args


@dataclass(kw_only=True)
class Lesson:
    """What is taught to which network.

    Attributes:
        checkpoint: of the network; it may have classes that were taught before.
        base: the network without them.
        legend: names and colours of all labels: base classes, classes taught before that stay, new classes.
        support: class name -> images of all novel classes, in the order of their labels.
        new: names of those that are taught now.
        size: (H, W) of the views.
        base_views: of the memory; or
        data: the base data that they are drawn from.
    """

    checkpoint: Checkpoint
    base: JointPOP
    legend: Legend
    support: dict[str, list[SupportImage]]
    new: list[str]
    size: tuple[int, int]
    base_views: KeptFeatures | None = None
    data: FoldData | None = None

    @property
    def taught_before(self) -> list[str]:
        """Names of the novel classes that the network knows already, and keeps."""
        return [name for name in self.support if name not in self.new]


def read_lesson(args: argparse.Namespace, device: torch.device) -> Lesson:
    """Read network, memory and photographs. Raises InputError for what is wrong with them.

    Writes nothing but the class lists of --data-dir, where these are missing.
    """
    checkpoint = read_checkpoint(resolve_checkpoint(args.restore_from))
    before = taught_before(checkpoint)
    base, legend = described_network(checkpoint, base_only=True)
    base = teachable(base)
    if unknown := [name for name in args.forget if name not in before]:
        raise InputError(
            f'--forget {some(unknown)}: {checkpoint.path} was taught {some(before) or "no class"}; base classes stay'
        )
    stay = {name: class_id for name, class_id in before.items() if name not in args.forget}
    if not stay and not args.support:
        raise InputError(f'without {some(args.forget)}, nothing is left but the base network; use its own checkpoint')
    if args.memory and args.data_dir and not before:
        raise InputError('--data-dir takes the place of --memory; give one of them')
    memory, size = None, tuple(checkpoint.config.get('base_size', cli.BASE_SIZE))
    if before or not args.data_dir:
        path = args.memory or Path(checkpoint.path).parent / NAME
        memory = read_memory(path, base, digest(base.state_dict()), device, taught=bool(before))
        if missing := [name for name in stay if name not in memory.support]:
            raise InputError(f'{path} has no photographs of {some(missing)}; --forget them, and teach them again')
    if not args.data_dir:
        size = tuple(memory.base.masks.shape[1:])
    found, others = read_support_folder(args.support, size) if args.support else ({}, [])
    if others:
        print(f'left out: {some(others)}')
    known = described_data_set(checkpoint)
    ids = {name: class_id for class_id, name in known.get('classes', ())}
    legend = extend_legend(legend.extended(stay), list(found), ids, known.get('ignore', (IGNORE_INDEX,)))
    for note in doubts(found, ids):
        print(f'note: {note}')
    data = from_flags.described_data(args, checkpoint.config) if args.data_dir else None
    return Lesson(
        checkpoint=checkpoint, base=base.to(device, memory_format=torch.channels_last), legend=legend,
        support={name: memory.support[name] for name in stay} | found, new=list(found), size=size,
        base_views=None if data else memory.base, data=data,
    )  # fmt: skip


def taught_before(checkpoint: Checkpoint) -> dict[str, int]:
    """As `taught_classes`. Raises InputError for other methods, and for classes whose images no memory has."""
    taught = taught_classes(checkpoint)
    if taught is None:
        checkpoint.expect_pop('utils.teach')
    elif checkpoint.model != TAUGHT_MODEL:
        raise InputError(
            f'{checkpoint.path} was taught by an earlier version; teach its base network again (of train_base.py)'
        )
    if taught is None and checkpoint.class_counts[1]:
        raise InputError(
            f'{checkpoint.path} has novel classes of ft_pop.py, whose images are in no memory; give its base network '
            '(of train_base.py), or a network that utils.teach has taught'
        )
    return taught or {}


def build_network(lesson: Lesson, seed: int) -> JointPOP:
    """The network to train, untrained."""
    config = lesson.checkpoint.config
    # where classes are forgotten only, the network stays of its kind
    options = JointPOP.best_options(max(map(len, lesson.support.values()))) if lesson.new else config.get('options')
    torch.manual_seed(seed)
    net = build_model(
        config['backbone'], lesson.base.num_base, len(lesson.support), config['os'], TAUGHT_MODEL, options
    )
    net.start_from(lesson.base)
    net.background = lesson.base.background
    return net.to(lesson.base.base_emb.device, memory_format=torch.channels_last)


def train(args: argparse.Namespace, lesson: Lesson, keeper: FeatureKeeper) -> Teacher:
    """Teach what there is to learn; where classes are forgotten only, the others stay as they are."""
    labels = dict(zip(lesson.support, lesson.legend.novel_labels, strict=True))
    steps = args.steps or STEPS * (1 + len(labels))
    settings = TrainingSettings(steps, args.batch_size, args.learning_rate, seed=args.seed)
    net, before = build_network(lesson, args.seed), list(taught_before(lesson.checkpoint))
    stay = [before.index(name) for name in lesson.taught_before]
    teacher = Teacher(
        net, lesson.base, SupportSamples(lesson.support, labels), lesson.base_views,
        earlier=net.inherited(lesson.checkpoint.state, stay) if stay else {},
        keeper=keeper, size=lesson.size, settings=settings,
        views=args.views, scale_range=args.scale_range,
    )  # fmt: skip
    if lesson.new:
        teacher.learn()
    return teacher


def base_miou(net: JointPOP, views: KeptFeatures, device: torch.device, dtype: torch.dtype) -> float:
    """Base mIoU on the base views, in percent."""
    confusion = evaluate(net, views, device, dtype)
    if not net.background:
        confusion[0] = 0  # novel pixels, which are no background and not counted
    return summarize(confusion, net.num_base)['base']


def save(args: argparse.Namespace, lesson: Lesson, net: JointPOP, network: str, base_miou: float):
    """Write memory.pt, then best.pth, which needs it to be taught more; what describes an earlier network goes."""
    write_memory(args.out / NAME, Memory(network, lesson.base_views, lesson.support))
    counts = {name: len(images) for name, images in lesson.support.items()}
    theirs = lesson.checkpoint.config
    config = {key: theirs[key] for key in ('dataset', 'fold', 'backbone', 'os', 'card', 'scale_range') if key in theirs}
    config |= {'model': TAUGHT_MODEL, 'options': net.options}
    config |= {'classes': lesson.legend.classes, 'base_size': list(lesson.size), 'taught': counts}
    save_checkpoint(args.out / 'best.pth', net, config, 0, {'base': base_miou})
    for path in (args.out / 'teach.json', *(args.out / 'panels').glob('*.png')):
        path.unlink(missing_ok=True)


def report(args: argparse.Namespace, lesson: Lesson, teacher: Teacher) -> dict[str, dict]:
    """Draw the photographs; returns what is known of each class, as `teaching_table` takes it."""
    samples, legend = teacher.samples, lesson.legend
    trained, predictions = teacher.segment(samples.ids)
    left_out, found = teacher.left_out() if args.leave_out and lesson.new else (0 * trained, {})
    predictions |= found
    classes = {}
    for name, label in zip(lesson.support, legend.novel_labels, strict=True):
        ids = [image_id for image_id in samples.ids if samples.label(image_id) == label]
        out = set(ids) & set(found)
        classes[name] = {
            'class_id': legend.class_ids[label], 'photographs': len(ids), 'new': name in lesson.new,
            'left_out': len(out), 'left_out_iou': iou_per_class(left_out)[label] if out else None,
            'trained_iou': iou_per_class(trained)[label],
        }  # fmt: skip
        rows = [
            (image_id.rpartition('/')[2], *samples.read(image_id), predictions[image_id], image_id in found)
            for image_id in ids
        ]
        draw_panel(args.out / 'panels' / f'{name}.png', name, rows, legend)
    return classes


def disappointments(classes: dict[str, dict], lost: float) -> list[str]:
    """What of a result is bad: IoU of `report`, and lost points of base mIoU."""
    notes = [
        f'{name} was not learned: look at panels/{name}.png. Are its masks right, and do they show all of it? If '
        'so, raise --steps, or take a base network that knows more'
        if known['new'] else f'{name}, taught before, is hardly recognised'
        for name, known in classes.items() if known['trained_iou'] < LEAST_IOU
    ]  # fmt: skip
    if lost > MOST_LOST:
        notes.append(
            f'base mIoU fell by {lost:.1f} points: a class may look like a base class, or its masks cover others'
        )
    return notes


@exits_cleanly
def main(args: argparse.Namespace):
    began = time.perf_counter()
    with process_group(args.device) as device:
        check_empty(args.out, args.overwrite)
        lesson = read_lesson(args, device)
        check_writable(args.out)
        dtype = precision(device, args.fp16)
        keeper = keeper_in_memory(lesson.base, device, dtype, print)
        if lesson.data:
            lesson.base_views = look_at_base(keeper, lesson.data, lesson.size, args.memory_mb).base
        teacher = train(args, lesson, keeper)
        before, after = (base_miou(net, lesson.base_views, device, dtype) for net in (lesson.base, teacher.net))
        save(args, lesson, teacher.net, keeper.network, after)
        seconds = time.perf_counter() - began
        print(f'{args.out / "best.pth"} is written, after {seconds:.0f} s')
        if args.leave_out and lesson.new:
            print('photographs are left out in turn, to say what to expect; stopping this leaves best.pth as it is')
        try:
            classes = report(args, lesson, teacher)
        except KeyboardInterrupt:
            print(f'{args.out / "best.pth"} is complete; only what to expect of it is not known')
            raise
        write_teaching(args.out, {
            'checkpoint': lesson.checkpoint.path, 'classes': classes, 'base_miou': {'before': before, 'after': after},
            'base_views': len(lesson.base_views.rows), 'precision': name_of(dtype), 'seconds': seconds,
            'settings': vars(args) | {'steps': teacher.settings.steps},
        })  # fmt: skip
        print(f'\n{teaching_table(classes)}\n')
        for note in disappointments(classes, before - after):
            print(f'note: {note}')
        print(
            f'base mIoU on the {len(lesson.base_views.rows)} base views: {before:.1f} % before, {after:.1f} % now\n'
            f'pictures of the photographs: {args.out / "panels"}\n'
            'to segment a folder of photographs:\n  '
            + shlex.join(['python', '-m', 'utils.predict', '--restore-from', str(args.out), '--images', 'FOLDER',
                          '--save-path', 'segmented'])
        )  # fmt: skip


def check_empty(out: Path, overwrite: bool):
    """InputError where --out holds checkpoints or results, unless they are to be replaced."""
    written = {'best.pth', NAME, 'teach.json', 'panels'}
    present = sorted(path.name for path in out.glob('*') if path.suffix in SUFFIXES or path.name in written)
    if present and not (overwrite and set(present) <= written):
        raise InputError(
            f'--out {out} holds {some(present)} already; give another folder'
            + ('' if overwrite else ', or --overwrite to replace what utils.teach has written')
        )


if __name__ == '__main__':
    main(parse_args())
