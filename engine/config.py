"""What a checkpoint says of its network (`from_flags.network_config`), compared with what a run expects."""

from pathlib import Path

from core.errors import InputError, some
from model import MODELS, base_model

MAY_DIFFER = ('classes', 'base_size', 'input_size', 'scale_range', 'card', 'supports')  # classes: compared by itself
DEFAULT_MODEL = 'pspnet_pop'  # of checkpoints that do not name theirs


def check_config(path: Path | str, config: dict, expected: dict):
    """Compare a checkpoint's config with what is expected, in the entries that both have; sizes and scales may differ.

    Args:
        path: for the message.
        config: the checkpoint's.
        expected: entries of such a config.

    Raises:
        InputError: they differ.
    """
    model = config.get('model', DEFAULT_MODEL)
    if config and model != expected.get('model', model):
        raise InputError(
            f'{path} is a checkpoint of {model}, expected {expected["model"]}. Give --model {model}, or a checkpoint '
            f'of {expected["model"]} (its base networks: train_base.py --model {base_model(expected["model"])}).'
        )
    found, wanted = (_entries(each, model) for each in (config, expected))
    differing = [key for key, value in wanted.items() if key in found and found[key] != value]
    if differing:
        flags = [f'--{"random-seed" if key == "seed" else key} {found[key]}' for key in differing]
        what = [f'{key} is {found[key]}, expected {wanted[key]}' for key in differing]
        raise InputError(
            f'{path} is a checkpoint of another run: {"; ".join(what)}. Give the flags that it was made with '
            f'({" ".join(flags)}), or another file.'
        )
    theirs, ours = (dict(each.get('classes', ())) for each in (config, expected))
    changed = [f'{c} is {theirs.get(c, "no class")}, expected {ours.get(c, "none")}'
               for c in sorted({*theirs, *ours}) if theirs.get(c) != ours.get(c)]  # fmt: skip
    if theirs and ours and (changed or list(theirs) != list(ours)):
        what = some(changed) if changed else f'base and novel ids are {list(theirs)}, expected {list(ours)}'
        raise InputError(
            f'{path} is of other classes than {config.get("dataset")!r} has now: {what}. Undo the change of its card, '
            'or train again.'
        )


def _entries(config, model):
    """The entries that must not differ: each option of the method is one, also those that an older file lacks."""
    entries = {key: value for key, value in config.items() if key not in MAY_DIFFER}
    if 'options' in entries and model in MODELS:
        entries |= MODELS[model].choose() | entries.pop('options')
    return entries
