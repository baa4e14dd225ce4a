"""Tensors as the arrays that pictures and files are made of."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def label_array(labels: torch.Tensor) -> np.ndarray:
    """Labels below 256 as uint8 on the CPU."""
    return labels.byte().cpu().numpy()


def similarity(prototypes: Sequence[torch.Tensor]) -> np.ndarray:
    """Cosine similarities of all prototypes, float32 [K, K].

    Args:
        prototypes: [Kb, C], and [Kn, C] if there are novel classes.
    """
    s = F.normalize(torch.cat([p.detach().float() for p in prototypes]), dim=1)
    return (s @ s.T).cpu().numpy()
