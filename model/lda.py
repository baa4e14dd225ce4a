"""Linear discriminant analysis on the features of POP's base network: novel classes without training."""

from collections.abc import Iterable

import torch

from model.joint_space import JointSpace
from model.network import Labelled, Maps


class LDA(JointSpace):
    """Novel classes as normal distributions with the covariance of base classes, which takes a mean of each only.

    Background and base classes keep their logits of stage 1. A novel class wins where `Discriminants`, in the joint
    space, call it likelier than all of them:

        logit_k = max of the logits of stage 1 + d_k - max of d over background and base classes

    and is then calibrated. Nothing is trained by gradients.

    Args: those of `Network`.
    """

    title = 'LDA'
    TRAINS_NOVEL = False

    def add_novel(self) -> None:
        """Add no prototypes: novel classes are discriminants."""

    def start_novel(self) -> None:
        """There is nothing to start from: `start_from_supports` makes all of it."""

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of `finish_maps`."""
        base = super().classify(maps, constants)  # of stage 1: there are no novel prototypes
        if not self.num_novel:
            return base
        best = base[:, self.first_label :].amax(dim=1, keepdim=True)
        return torch.cat([base, self.calibrated(best + self.discriminant_margins(maps))], dim=1)

    def start_from_supports(self, supports: Iterable[Labelled], base_views: Iterable[Labelled]) -> None:
        """Fit the discriminants."""
        self.fit_discriminants(supports, base_views)

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The discriminants of the base classes, followed by those of the novel ones; in stage 1 `base_emb`."""
        if not self.num_novel:
            return (self.base_emb,)
        base, novel = self.discriminants.weight[1:].split([self.num_base, self.num_novel])
        return base, novel

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        num_base = len(state['base_emb'])
        return num_base, len(state['discriminants.bias']) - 1 - num_base if 'discriminants.bias' in state else 0
