"""What a network has learned from, kept beside it in memory.pt, so that it can be taught more without the data.

Features and labels of a few views of each base class in half precision, and the photographs of classes that were taught
(`utils.teach`), at the network's size. A memory belongs to one base network: features of another one mean nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core import IGNORE_INDEX
from core.errors import InputError
from dataset import Augmentation, FoldData
from dataset.own_classes import SupportImage
from dataset.views import base_views
from engine.checkpoint import write_file
from engine.distributed import on_main
from engine.feature_store import digest
from engine.features import FeatureKeeper, KeptFeatures, kept_bytes, kept_shapes
from engine.weights import read_content
from model import POP, JointPOP
from model.kernels import fuse

NAME = 'memory.pt'
VERSION = 3
MOST_VIEWS = 20  # of each base class
LIMIT_MB = 300
MOST_MB = 1000  # without a limit, for one view of each of many classes
SCALE_RANGE = (0.8, 1.25)  # of base views, relative to the size that fits: about that of the training on VOC


@dataclass
class Memory:
    """What is kept of a network.

    Attributes:
        network: digest of the base network's weights (`feature_store.digest`).
        base: maps and masks of base views, as many of each class, in the order of the classes.
        support: class name -> images of a class that was taught, in the order of the labels.
    """

    network: str
    base: KeptFeatures
    support: dict[str, list[SupportImage]] = field(default_factory=dict)


def teachable(base: POP) -> JointPOP:
    """A base network of POP as `utils.teach` teaches it; they share their weights."""
    if isinstance(base, JointPOP):
        return base
    net = JointPOP(base.backbone, base.decoder, base.num_base).to(base.base_emb.device)
    net.base_emb, net.classifier, net.background = base.base_emb, base.classifier, base.background
    return net


def views_per_class(net: JointPOP, size: tuple[int, int], limit_mb: float | None) -> int:
    """How many views of each base class fit into so many MB (10^6 bytes), at most `MOST_VIEWS`.

    Without a limit, it is `LIMIT_MB`, or what one view of each class takes, if that is more, but at most `MOST_MB`.

    Raises:
        InputError: not even one.
    """
    need = net.num_base * kept_bytes(net, size) / 1e6  # of one view per class
    if limit_mb is None:
        limit_mb = min(max(LIMIT_MB, need), MOST_MB)
    if need > limit_mb:
        raise InputError(
            f'one view of each of {net.num_base} base classes takes {need:.2f} MB, more than the {limit_mb:g} MB of '
            f'the memory; utils.memory and utils.teach take --memory-mb {math.ceil(need)}'
        )
    return min(MOST_VIEWS, int(limit_mb / need))


def keeper_in_memory(
    net: JointPOP, device: torch.device, dtype: torch.dtype, log: Callable[[str], None], num_workers: int = 0
) -> FeatureKeeper:
    """Keeps features of a base network on the GPU or in memory, never on disk."""
    return FeatureKeeper(
        frozen=fuse(net, dtype), network=digest(net.state_dict()), device=device, dtype=dtype, place='auto',
        memory_gb=float('inf'), store=None, num_workers=num_workers, log=log,
    )  # fmt: skip


def look_at_base(keeper: FeatureKeeper, data: FoldData, size: tuple[int, int], limit_mb: float | None = None) -> Memory:
    """Make the memory of a base network from its data.

    Args:
        keeper: of `keeper_in_memory`.
        data: the fold, with its lists.
        size: (H, W) that images are resized to fit, and of the views.
        limit_mb: of the features, in 10^6 bytes; None: as in `views_per_class`.

    Raises:
        InputError: as `views_per_class`, a base class has no image, or the data has other base classes.
    """
    if len(data.base_ids) != keeper.frozen.num_base:
        raise InputError(
            f'{data.data_dir} has {len(data.base_ids)} base classes in fold {data.fold}; the network has '
            f'{keeper.frozen.num_base}. Give the data and the fold that it was trained on.'
        )
    count = views_per_class(keeper.frozen, size, limit_mb)
    base, class_lists = data.base_images(Augmentation(size, SCALE_RANGE, fit=True))
    views = base_views(base, class_lists, count)
    return Memory(keeper.network, keeper.keep(views, 'base view', size, whole=True))


def write_memory(path: Path, memory: Memory):
    """Write a memory; only the main process does. Raises InputError if the file cannot be written."""
    kept = memory.base
    content = {
        'format': 'pop-memory', 'version': VERSION, 'network': memory.network,
        'arrays': {name: array.cpu() for name, array in kept.arrays.items()}, 'rows': kept.rows,
        'support': {
            name: [(each.name, torch.from_numpy(each.image), torch.from_numpy(each.mask)) for each in images]
            for name, images in memory.support.items()
        },
    }  # fmt: skip

    on_main(lambda: write_file(path, lambda file: torch.save(content, file)))


def owner_of(path: Path) -> tuple[str | None, list[str]]:
    """Digest of the network whose memory a file is, and the taught classes whose photographs it holds.

    Returns:
        (None, []) where it is no memory.

    Raises:
        InputError: the file is damaged.
    """
    content = read_content(path)
    if not isinstance(content, dict) or 'network' not in content:
        return None, []
    return content['network'], list(content.get('support', ()))


def read_memory(path: Path, net: JointPOP, network: str, device: torch.device, taught: bool = False) -> Memory:
    """Read a memory.

    Args:
        path: of the file.
        net: the base network, as `teachable`.
        network: its digest.
        device: of the maps that are taken from it.
        taught: the network was taught before; then no command makes its memory again, as it holds what was taught.

    Raises:
        InputError: there is no such file, it is damaged, or of another network or version.
    """
    remedy = 'Make it again with python -m utils.memory'
    if taught:
        remedy = 'It holds the photographs that were taught: copy it back, or teach the base network again, with them'
    if taught and not path.is_file():
        raise InputError(f'there is no {path}, the memory of the taught network, as utils.teach wrote it. {remedy}')
    if not path.is_file():
        raise InputError(
            f'there is no {path}, the memory of the base network, which train_base.py writes at its end. Give '
            '--data-dir with its data, or make it with: python -m utils.memory --restore-from '
            f'{path.parent} --data-dir DATA'
        )
    content = read_content(path)
    if not isinstance(content, dict) or content.get('format') != 'pop-memory':
        raise InputError(f'{path} is no memory of a network; expected a file that utils.memory or train_base.py wrote')
    if content.get('version') != VERSION:
        raise InputError(f'{path} is of version {content.get("version")}; this code reads version {VERSION}. {remedy}')
    if content['network'] != network:
        raise InputError(
            f'{path} is the memory of another network than this checkpoint: their weights differ. Give the checkpoint '
            'that it was made for (of train_base.py: best.pth), or make it again with python -m utils.memory'
        )
    try:
        arrays, rows = content['arrays'], content['rows']
        size = tuple(arrays['mask'].shape[1:])
        expected = {
            name: (dtype, (len(arrays['mask']), *shape)) for name, (dtype, shape) in kept_shapes(net, size).items()
        }
        if {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()} != expected:
            raise ValueError('arrays of other shapes')
        if not _knows_only(arrays['mask'], net.num_base):
            raise ValueError(f'labels beyond those of {net.num_base} base classes')
        support = {
            name: [SupportImage(photograph, image.numpy(), mask.numpy()) for photograph, image, mask in images]
            for name, images in content['support'].items()
        }
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f'{path} is damaged ({error}). {remedy}') from error
    return Memory(network, KeptFeatures(arrays, rows, range(len(arrays['mask'])), device), support)


def _knows_only(masks, num_base):
    """Whether masks have no other labels than background, base classes and ignored pixels."""
    return bool(((masks <= num_base) | (masks == IGNORE_INDEX)).all())


def is_memory_of(path: Path, network: str) -> bool:
    """Whether a file is the memory, of this version, of a network with this digest."""
    try:
        content = read_content(path) if path.is_file() else {}
        return (content.get('version'), content.get('network')) == (VERSION, network)
    except (InputError, AttributeError):
        return False
