"""The network that a checkpoint of ours describes, and the classes that it knows: no flags and no data are needed."""

from core.errors import InputError
from dataset import DATASETS
from dataset.legend import Legend
from engine.checkpoint import Checkpoint
from model import Network, build_model


def described_network(checkpoint: Checkpoint, base_only: bool = False) -> tuple[Network, Legend]:
    """Build and load the network of a checkpoint.

    Args:
        checkpoint: of this project.
        base_only: without the novel classes that it may have.

    Returns:
        The network, and names and colours of its labels.

    Raises:
        InputError: the checkpoint does not say what it was trained on, or what it says does not fit its weights.
    """
    path, config = checkpoint.path, checkpoint.config
    if missing := {'dataset', 'fold', 'backbone', 'os'} - set(config):
        raise InputError(
            f'{path} does not say its {", ".join(sorted(missing))}; expected a checkpoint that train_base.py, '
            'ft_pop.py or utils.teach of this project wrote. test.py can evaluate others, on images with masks.'
        )
    num_base, num_novel = checkpoint.class_counts
    legend = _legend(checkpoint, num_base, num_novel)
    try:
        net = build_model(config['backbone'], num_base, 0 if base_only else num_novel, config['os'],
                          checkpoint.model, config.get('options'))  # fmt: skip
    except ValueError as error:
        raise InputError(f'{path}: {error}') from error
    if base_only:
        checkpoint.load_base_into(net)
    else:
        checkpoint.load_into(net)
    net.background = legend.background is not None
    return net, legend.cut(net.num_logits)


def described_data_set(checkpoint: Checkpoint) -> dict:
    """What is known of a checkpoint's data set, as `DatasetSpec.described`; {} where it is not built in and unknown."""
    built_in = DATASETS.get(checkpoint.config.get('dataset'))
    return checkpoint.config.get('card') or (built_in.described() if built_in else {})


def taught_classes(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Class name -> class id of what `utils.teach` has taught a network, by label; None where it has taught nothing."""
    if 'taught' not in checkpoint.config:
        return None
    num_base, num_novel = checkpoint.class_counts
    return {name: class_id for class_id, name in checkpoint.config['classes'][num_base : num_base + num_novel]}


def _legend(checkpoint, num_base, num_novel):
    """Names and colours of at least the labels of a checkpoint: of its own classes, or of a built-in data set."""
    path, config = checkpoint.path, checkpoint.config
    row, known = DATASETS.get(config['dataset']), described_data_set(checkpoint)
    if classes := config.get('classes'):
        if len(classes) < num_base + num_novel:
            raise InputError(f'{path} names {len(classes)} classes, but has {num_base} base and {num_novel} novel ones')
        palette = known.get('palette', 'spread')
        if not isinstance(palette, str):
            palette = tuple((class_id, tuple(color)) for class_id, color in palette)
        return Legend.of(classes, num_base, palette, known.get('background', 0))
    if not row:
        raise InputError(
            f'{path} does not name its classes, and its data set {config["dataset"]!r} is not built in; expected one '
            f'of {", ".join(DATASETS)}'
        )
    try:
        legend = row.legend(config['fold'])
    except ValueError as error:
        raise InputError(f'{path}: {error}') from error
    expected = legend.num_base, len(legend.novel_labels)
    if (num_base, num_novel) not in (expected, (legend.num_base, 0)):
        raise InputError(
            f'{path} has {num_base} base and {num_novel} novel classes; fold {config["fold"]} of '
            f'{config["dataset"]!r} has {expected[0]} and {expected[1]}. Have they changed since the training?'
        )
    return legend
