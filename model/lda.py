"""Linear discriminant analysis on the features of POP's base network: novel classes without training."""

from collections.abc import Iterable
from types import MappingProxyType

import torch
from torch import nn

from model.discriminants import Discriminants
from model.joint import JointPOP
from model.network import Labelled, Maps
from model.pop import POP


class LDA(JointPOP):
    """Novel classes as normal distributions with the covariance of base classes, which takes a mean of each only.

    Features are those of the decoder and of the backbone. Background and base classes keep their logits of stage 1. A
    novel class wins where `Discriminants` call it likelier than all of them:

        logit_k = max of the logits of stage 1 + d_k - max of d over background and base classes

    and is then calibrated as in `JointPOP`. Nothing is trained by gradients.

    Args: those of `Network`.
    """

    title = 'LDA'
    OPTIONS = MappingProxyType({'calibration': JointPOP.OPTIONS['calibration']})
    TRAINS_NOVEL = False
    extra = property(lambda self: self.backbone.out_channels + self.backbone.middle_channels)
    fixed_background = True

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, 0, **options)
        self.num_novel = num_novel
        if num_novel:
            self.discriminants = Discriminants(decoder.out_channels + self.extra, num_base, num_novel)
        if self.calibrates:
            self.register_buffer('novel_offset', torch.zeros(num_novel))

    def start_novel(self) -> None:
        """There is nothing to start from: `start_from_supports` makes all of it."""

    def project_backbone(self, x: torch.Tensor) -> Maps:
        """'discriminants' [N, 1 + Kb + Kn]: the part of the backbone's features x [N, extra] of these."""
        return {'discriminants': x @ self.discriminants.weight[:, -self.extra :].T}

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of `finish_maps`."""
        base = POP.classify(self, maps, constants)  # of stage 1
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
