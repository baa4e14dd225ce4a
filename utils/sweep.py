"""Train and evaluate on a grid of methods, data sets, folds, shots and seeds, and write the paper's table.

    python -m utils.sweep --data voc=VOC2012 --shot 1 5 10 --seed 123 234 345 --out runs/voc \\
        --base-flags="--restore-from resnet50_v2.pth" --novel-flags="--fix-lr --update-base"
    python -m utils.sweep --model pspnet_pop pspnet_lda pspnet_joint --model-flags="pspnet_joint=--recipe best" \\
        --data voc=VOC2012 --out runs/methods --base "runs/voc/voc_fold{fold}/base"

One base network is trained for each method and fold, unless --base names those that are there already. Stage 2 starts
from it for each shot, with all seeds in one run. All methods have the same support images. Run the same command again
to resume: commands that are done are skipped, and interrupted runs resume. --flags, --base-flags etc. are passed on to
the scripts.

Writes the runs to OUT/DATASET_foldF/base and OUT/DATASET_foldF/Kshot (OUT/DATASET_foldF_MODEL/... for other methods
than POP), each with console.txt (output) and sweep.json (commands that are done). Writes after each evaluation
OUT/table.md and table.tex (mean ± standard deviation over seeds, of `last` and of `best`; with several methods also
their differences to the first one on the same support images, with standard error) and OUT/table.csv (one row for each
seed, with its run's folder).
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from core import signals
from core.errors import InputError, exits_cleanly
from core.files import check_writable
from dataset.classes import find_dataset
from engine.checkpoint import resolve_checkpoint
from engine.commands import ROOT, Step, run
from engine.config import DEFAULT_MODEL
from model import MODELS, base_model
from report.sweep_tables import read_results, write_tables
from utils.cli import add_seeds, make_parser, not_negative, positive
from utils.data_flags import check_folds


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        '--data', nargs='+', required=True, metavar='NAME=DIR|CARD', help='data sets and their folders'
    )  # fmt: skip
    parser.add_argument('--fold', type=not_negative, nargs='+', help='default: all folds that all data sets have')
    parser.add_argument('--shot', type=positive, nargs='+', default=(1, 5), help='default: 1 5')
    add_seeds(parser, '--seed', 'default: 123 234 345', (123, 234, 345))
    parser.add_argument('--out', type=Path, required=True, help='folder of all runs and of the tables')
    parser.add_argument(
        '--model', choices=list(MODELS), nargs='+', default=(DEFAULT_MODEL,),
        help=f'methods; the others are compared with the first one (default: {DEFAULT_MODEL})',
    )  # fmt: skip
    parser.add_argument(
        '--select', choices=('last', 'best'), nargs='+', default=('last', 'best'),
        help='weights that are evaluated; best is selected on the evaluation images (default: both)',
    )  # fmt: skip
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='commands to run at a time (default: 1)')
    parser.add_argument(
        '--nproc', type=positive, default=1, metavar='N',
        help="processes of train_base.py and test.py (default: 1); stage 2, with its batch of 1, always has one",
    )  # fmt: skip
    parser.add_argument(
        '--base', metavar='RUN',
        help='base networks that are there already, instead of training them: a folder or checkpoint, with {dataset}, '
        '{fold} and {model} for what it depends on, e.g. runs/{dataset}_fold{fold}_base',
    )  # fmt: skip
    parser.add_argument('--train-list', help='train list of all commands; for one data set only')
    for name, whose in (
        ('--flags', 'all three scripts'),
        ('--training-flags', 'train_base.py and ft_pop.py'),
        ('--base-flags', 'train_base.py, e.g. --restore-from'),
        ('--novel-flags', 'ft_pop.py'),
        ('--test-flags', 'test.py'),
    ):
        parser.add_argument(
            name, type=shlex.split, action='extend', default=[], metavar='"FLAG ..."',
            help=f'flags of {whose}; may be repeated',
        )  # fmt: skip
    parser.add_argument(
        '--shot-flags', action='append', default=[], metavar='"SHOT=FLAG ..."',
        help='flags of ft_pop.py for one number of shots, e.g. "5=--num-epoch 200"',
    )  # fmt: skip
    parser.add_argument(
        '--model-flags', action='append', default=[], metavar='"MODEL=FLAG ..."',
        help='flags of ft_pop.py for one method, e.g. "pspnet_ft=--train decoder"',
    )  # fmt: skip
    parser.add_argument(
        '--model-base-flags', action='append', default=[], metavar='"MODEL=FLAG ..."',
        help='flags of train_base.py for one method, e.g. "pspnet_capl=--learning-rate 1e-2"',
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_grid(parser, args)
    return args


def check_grid(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuse a grid that does not fit together; turn --data and the flags of shots and methods into dicts."""
    data, folds = {}, None
    for pair in args.data:
        name, _, folder = pair.partition('=')
        try:
            spec = find_dataset(name)
        except InputError as error:
            parser.error(f'--data {pair}: {error}')
        if not (folder or spec.root):
            parser.error(f'--data {pair}: expected {spec}=DIR')
        check_folds(parser, spec, args.fold or ())
        folds = min(folds or len(spec.folds), len(spec.folds))
        if not spec.tested().val_list:
            parser.error(f'--data {pair}: {spec} has no images to evaluate (val: none)')
        data[spec.name] = ['--dataset', spec.choice, '--data-dir', folder or str(spec.root)]
    args.data, args.fold = data, args.fold or list(range(folds))
    if not args.fold:
        parser.error('--data names a data set without novel classes, so it has no folds')
    args.shot_flags = flags_of(parser, args, 'shot', positive)
    args.model_flags = flags_of(parser, args, 'model', str)
    args.model_base_flags = flags_of(parser, args, 'model', str, 'model-base')
    of_all = (args.novel_flags, *args.shot_flags.values(), args.model_flags.get(DEFAULT_MODEL, []))
    if any(word.startswith('--rec') for words in of_all for word in words):
        parser.error(
            f'--recipe sets the method; give it to one other than {DEFAULT_MODEL}: --model {DEFAULT_MODEL} '
            'pspnet_joint --model-flags="pspnet_joint=--recipe best"'
        )
    for model, words in args.model_base_flags.items():
        if words and MODELS[model].BASE_MODEL:
            parser.error(f'--model-base-flags: {model} starts from the base networks of {MODELS[model].BASE_MODEL}')
    if args.base:
        check_base(parser, args)
    if args.train_list and len(args.data) > 1:
        parser.error('--train-list can be given for one data set only')


def check_base(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuse a --base that is one network for several, or that flags of the training go with."""
    several = {'dataset': args.data, 'fold': args.fold, 'model': {base_model(model) for model in args.model}}
    for name, values in several.items():
        if len(values) > 1 and f'{{{name}}}' not in args.base:
            parser.error(f'--base {args.base} is one network, but there are {len(values)} of {name}; put {{{name}}} in')
    if args.base_flags or any(args.model_base_flags.values()):
        parser.error('--base-flags and --model-base-flags are of a training that --base takes the place of')
    try:
        args.base.format(dataset='', fold=0, model='')
    except (AttributeError, KeyError, IndexError, ValueError):
        parser.error(f'--base {args.base}: only {{dataset}}, {{fold}} and {{model}} can stand in braces')


def flags_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, kind: type, prefix: str = ''
) -> dict:
    """Value of the flag --NAME -> the flags of --PREFIX-flags for it; a value that --NAME does not have is refused."""
    flags, prefix = {value: [] for value in getattr(args, name)}, prefix or name
    for text in getattr(args, f'{prefix}_flags'.replace('-', '_')):
        value, _, of_value = text.partition('=')
        try:
            known = kind(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f'--{prefix}-flags: {error}')
        if known not in flags:
            parser.error(f'--{prefix}-flags {text}: --{name} has {", ".join(map(str, flags))}')
        flags[known] += shlex.split(of_value)
    return flags


def plan(args: argparse.Namespace) -> list[Step]:
    """Plan the grid: for each fold and method the base network, and for each shot lists, stage 2 and evaluations.

    Returns:
        Each step after those that it builds on.
    """
    steps = []
    for dataset, flags in args.data.items():
        for fold in args.fold:
            train_list = ['--train-list', args.train_list] if args.train_list else []
            given_base = args.base and partial(args.base.format, dataset=dataset, fold=fold)
            data = [*flags, *train_list, '--fold', fold]
            of_fold = FoldPlan(args, args.out / f'{dataset}_fold{fold}', data, given_base)
            for model in args.model:
                of_fold.add_method(model)
            steps += of_fold.steps
    return steps


def novel_flags(args: argparse.Namespace, model: str, shot: int) -> list[str]:
    """Flags that ft_pop.py alone gets for a method and shot; later ones have priority."""
    return [*args.novel_flags, *args.shot_flags[shot], *args.model_flags[model]]


class FoldPlan:
    """Plans a fold, method by method.

    Args:
        args: the grid.
        place: folder of the fold's runs.
        data: flags that say which data it has.
        given_base: gives the base network of a `model`; None: it is trained.

    Attributes:
        steps: planned so far, each after those that it builds on.
    """

    def __init__(self, args: argparse.Namespace, place: Path, data: list, given_base: Callable[..., str] | None):
        self.args, self.place, self.data, self.given_base = args, place, data, given_base
        launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', args.nproc]
        self.together = launch if args.nproc > 1 else [sys.executable]
        self.steps = []
        self._bases = {}  # base model -> its network, and the steps that it takes
        self._lists = {}  # shot -> lists, which all methods share

    def _add(self, title, script, folder, after, *command):
        name = f'{folder.relative_to(self.args.out)}, {title}'
        self.steps.append(Step(name, script, tuple(map(str, command)), folder, tuple(after)))
        return self.steps[-1]

    def _of(self, model):
        """Folder and flags of a model; named only where it is not the default, so that older commands stay the same."""
        if model == DEFAULT_MODEL:
            return self.place, [*self.data, *self.args.flags]
        place = self.place.with_name(f'{self.place.name}_{model}')
        return place, [*self.data, '--model', model, *self.args.flags]

    def _base(self, model):
        """Plan a base network and its evaluation, once; returns the network, and the steps that it takes."""
        if model not in self._bases:
            args, (folder, flags) = self.args, self._of(model)
            folder /= 'base'
            network, own, after = folder, [], []
            if self.given_base:
                network, own = resolve_checkpoint(self.given_base(model=model)), ['--save-path', folder]
            else:
                after = [self._add(
                    'training', 'train_base', folder, (), *self.together, ROOT / 'train_base.py', *flags,
                    *args.training_flags, '--snapshot-dir', folder, *args.base_flags,
                    *args.model_base_flags.get(model, []),
                )]  # fmt: skip
            self._add(
                'evaluation', 'test', folder, after, *self.together, ROOT / 'test.py', *flags, '--restore-from',
                network, *own, *args.test_flags,
            )  # fmt: skip
            self._bases[model] = network, after
        return self._bases[model]

    def add_method(self, model: str):
        """Plan a method: the base network, and for each shot lists, stage 2 and evaluations."""
        args, (base, after), (folder, flags) = self.args, self._base(base_model(model)), self._of(model)
        for shot in args.shot:
            runs = folder / f'{shot}shot'
            draws = ['--shot', shot, '--random-seed', ','.join(map(str, args.seed))]
            if shot not in self._lists:  # the first makes the class lists, from all masks
                first = list(self._lists.values())[:1]
                self._lists[shot] = self._add(
                    'lists', 'gen_fs_list', runs, after or first, sys.executable, '-m', 'utils.gen_fs_list',
                    *self.data, '--shot', shot, '--seed', *args.seed,
                )  # fmt: skip
            taught = self._add(
                'training', 'ft_pop', runs, [*after, self._lists[shot]], sys.executable, ROOT / 'ft_pop.py', *flags,
                *args.training_flags, *draws, '--restore-from', base, '--snapshot-dir', runs,
                *novel_flags(args, model, shot),
            )  # fmt: skip
            # without training, both have the same weights
            for select in args.select if MODELS[model].TRAINS_NOVEL else args.select[:1]:
                results, own = runs, []
                if select != 'best':
                    results, own = runs / select, ['--select', select, '--save-path', runs / select]
                self._add(
                    'evaluation', 'test', results, [taught], *self.together, ROOT / 'test.py', *flags, *draws,
                    '--restore-from', runs, *own, *args.test_flags,
                )  # fmt: skip


def update_tables(args: argparse.Namespace, steps: list[Step]):
    """Write the tables of the evaluations that are done, if any."""
    evaluations = [step for step in steps if step.script == 'test']
    evaluated = [step.folder for step in evaluations if step.done()]
    missing = [step.name for step in evaluations if step.folder not in evaluated]
    flags = {
        f'{model}, {shot}-shot': shlex.join([*args.flags, *args.training_flags, *novel_flags(args, model, shot)])
        for model in args.model for shot in args.shot
    }  # fmt: skip
    if rows := read_results(evaluated, args.out):
        write_tables(args.out, rows, args.fold, flags, missing)


@partial(exits_cleanly, resumes=True)
def main(args: argparse.Namespace):
    args.out = args.out.resolve()
    check_writable(args.out)
    signals.listen()
    steps = plan(args)
    left = [step for step in steps if not step.done()]
    print(f'{len(steps)} commands, {len(steps) - len(left)} of them done before', flush=True)

    def update(step):
        if step.script == 'test':
            update_tables(args, steps)

    try:
        failed = run(left, args.jobs, update)
    finally:
        update_tables(args, steps)
    if (args.out / 'table.md').is_file():
        print((args.out / 'table.md').read_text())
    if failed:
        raise InputError(f'{len(failed)} commands failed: {"; ".join(step.name for step in failed)}')


if __name__ == '__main__':
    main(parse_args())
