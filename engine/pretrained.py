"""ImageNet weights of torchvision."""

import urllib.error

from torchvision import models

from core.errors import InputError
from core.ranks import is_main
from engine.checkpoint import Checkpoint


def imagenet_checkpoint(backbone: str) -> Checkpoint:
    """torchvision's ImageNet weights of a backbone, downloaded unless they are cached.

    Raises:
        InputError: no such weights, or no network to download them through.
    """
    try:
        weights = models.get_model_weights(backbone)
    except ValueError:
        raise InputError(
            f'torchvision has no ImageNet weights for {backbone}. Give the path of a file with --restore-from (for '
            'resnet50v2: the resnet50_v2.pth that PSPNet and PFENet use), or use --backbone resnet50.'
        ) from None
    try:
        state = weights.IMAGENET1K_V1.get_state_dict(progress=is_main(), check_hash=True)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f'cannot download {weights.IMAGENET1K_V1.url} ({error}). Download it elsewhere and give its path with '
            '--restore-from.'
        ) from error
    return Checkpoint('imagenet', state, {})
