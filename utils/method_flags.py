"""Flags of ft_pop.py that are options of methods (`Network.OPTIONS`), and recipes: defaults that go together."""

import argparse
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from core.errors import InputError
from core.ranks import is_main, world_size
from dataset.support_list import read_supports
from model import MODELS
from utils.data_flags import check_folds

# of the training, which some methods do not need
TRAINING_FLAGS = (
    'input_size', 'scale_range', 'batch_size', 'learning_rate', 'momentum', 'weight_decay', 'power', 'num_epoch',
    'start_epoch', 'fix_lr', 'accumulate', 'update_base', 'update_epoch', 'views', 'base_views', 'val_every',
)  # fmt: skip
BASE_VIEW_FLAGS = ('input_size', 'scale_range', 'base_views')  # what base views are
PAIRS = 80  # of a support and a base view for each base class, in all epochs


# name -> defaults of flags; None depends on other flags (`finish_recipe`)
RECIPES: Mapping[str, dict] = MappingProxyType({
    'best': {
        'model': 'pspnet_joint', 'views': 20, 'batch_size': 4, 'learning_rate': 3e-3, 'num_epoch': None,
        'val_every': None,
    },
})  # fmt: skip


def add_recipe_flag(parser: argparse.ArgumentParser, argv: Sequence[str] | None):
    """Add --recipe, and set the defaults that it stands for; flags that are given as well have priority."""
    parser.add_argument(
        '--recipe', choices=tuple(RECIPES),
        help='other defaults that go together. best: --model pspnet_joint --views 20 --batch-size 4 --learning-rate '
        f'3e-3, {PAIRS} / SHOT epochs, validated after the last; with one support image of each class --discriminants '
        'added (default: those of the published method)',
    )  # fmt: skip
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    early.add_argument('--recipe', choices=tuple(RECIPES))
    try:
        known, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:  # the parser itself will say so
        return
    if known.recipe:
        parser.set_defaults(**RECIPES[known.recipe])


def finish_recipe(args: argparse.Namespace):
    """Set what a recipe leaves to other flags. Raises InputError for a support list that cannot be read."""
    args.num_epoch = args.num_epoch or max(PAIRS // args.shot, 1)  # of SHOT pairs for each base class
    args.val_every = args.val_every or args.num_epoch
    images = args.shot
    if args.support_list:  # then --shot counts base images only
        novel = {c: args.dataset.classes[c] for c in args.dataset.novel_ids(args.fold)}
        images = max(map(len, read_supports(args.support_list, novel).values()))
    for name, choice in MODELS[args.model].best_options(images).items():
        setattr(args, name, getattr(args, name) or choice)


def add_method_flags(parser: argparse.ArgumentParser):
    """A flag for each option of any method; not given, it is the method's default."""
    group = parser.add_argument_group('options of methods')
    names = dict.fromkeys(name for method in MODELS.values() for name in method.OPTIONS)
    for name in names:
        having = {model: method.OPTIONS[name] for model, method in MODELS.items() if name in method.OPTIONS}
        choices = dict.fromkeys(choice for meanings in having.values() for choice in meanings)
        texts = [
            f'{model}: ' + '; '.join(f'{choice}: {meaning}' for choice, meaning in meanings.items())
            for model, meanings in having.items()
        ]
        group.add_argument(f'--{name}', choices=list(choices), help=f'{". ".join(texts)} (default: the first)')


def check_method_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Set the options of --model that were not given; end the program with exit code 2 where it has no such option.

    Where the method trains nothing, the flags of the training go back to their defaults.
    """
    method = MODELS[args.model]
    if args.recipe and not method.TRAINS_NOVEL:
        parser.error(f'--recipe {args.recipe} says how to train; --model {args.model} trains nothing')
    names = dict.fromkeys(name for other in MODELS.values() for name in other.OPTIONS)
    check_folds(parser, args.dataset, [args.fold])  # a recipe looks at the fold's classes
    try:
        if args.recipe:
            finish_recipe(args)
        chosen = method.choose({name: choice for name in names if (choice := getattr(args, name))})
    except InputError as error:
        parser.error(f'{error}')
    except ValueError as error:
        parser.error(f'--model {args.model}: {error}')
    for name in names:
        setattr(args, name, chosen.get(name))
    if not method.TRAINS_NOVEL:
        forget_training_flags(parser, args)


def forget_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Set the flags of the training back to their defaults; those that were given are named in a note."""
    used = BASE_VIEW_FLAGS if MODELS[args.model].uses_base_views(method_options(args)) else ()
    defaults = {name: parser.get_default(name) for name in TRAINING_FLAGS if name not in used}
    given = [f'--{name.replace("_", "-")}' for name, value in defaults.items() if getattr(args, name) != value]
    if given and is_main():
        print(f'note: {args.model} trains nothing, so {", ".join(given)} have no effect')
    vars(args).update(defaults | {'num_epoch': 1, 'batch_size': world_size()})


def method_options(args: argparse.Namespace) -> dict[str, str]:
    """The options of --model, as `build_model` takes them; none where a script has no flags for them."""
    return {name: choice for name in MODELS[args.model].OPTIONS if (choice := getattr(args, name, None))}


def method_in_words(args: argparse.Namespace) -> str:
    """The method of ft_pop.py with its options, and how long it trains on what."""
    method = MODELS[args.model]
    words = f'{method.described(method_options(args))} (--model {args.model})'
    if not method.TRAINS_NOVEL:
        return f'{words}, without training'
    kept = f' on {args.views} kept views of each support image' if args.views else ''
    return (
        f'{words}, {args.num_epoch} epochs in batches of {args.batch_size}{kept}, learning rate {args.learning_rate:g}'
    )
