"""Flags of ft_pop.py that are options of methods (`Network.OPTIONS`)."""

import argparse

from core.ranks import is_main, world_size
from model import MODELS

# of the training, which does not take place where a method registers its novel classes
TRAINING_FLAGS = (
    'input_size', 'scale_range', 'batch_size', 'learning_rate', 'momentum', 'weight_decay', 'power', 'num_epoch',
    'start_epoch', 'fix_lr', 'accumulate', 'update_base', 'update_epoch', 'views', 'base_views', 'val_every',
)  # fmt: skip


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
    names = dict.fromkeys(name for other in MODELS.values() for name in other.OPTIONS)
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    try:
        chosen = method.choose(given)
    except ValueError as error:
        parser.error(f'--model {args.model}: {error}')
    for name in names:
        setattr(args, name, chosen.get(name))
    if method.REGISTERS:
        forget_training_flags(parser, args)


def forget_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Set the flags of the training back to their defaults; those that were given are named in a note."""
    defaults = {name: parser.get_default(name) for name in TRAINING_FLAGS}
    given = [f'--{name.replace("_", "-")}' for name, value in defaults.items() if getattr(args, name) != value]
    if given and is_main():
        print(f'note: {args.model} registers prototypes and trains nothing, so {", ".join(given)} have no effect')
    vars(args).update(defaults | {'num_epoch': 1, 'batch_size': world_size()})


def method_options(args: argparse.Namespace) -> dict[str, str]:
    """The options of --model, as `build_model` takes them; none where a script has no flags for them."""
    return {name: choice for name in MODELS[args.model].OPTIONS if (choice := getattr(args, name, None))}
