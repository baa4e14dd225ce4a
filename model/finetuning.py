"""PSPNet, fine-tuned: a linear classifier, to which stage 2 adds rows for the novel classes.

Dimensions: B batch, C feature channels, Kb base classes, Kn novel classes, h x w feature size.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from model.losses import cross_entropy
from model.network import AUXILIARY_CHANNELS, AUXILIARY_WEIGHT, Maps, Network, auxiliary_head, single


class FineTuned(Network):
    """Segmenter with one 1x1 convolution per set of classes: background and base classes, novel classes.

    Stage 1 has an auxiliary classifier (Zhao et al., CVPR 2017) on the backbone's middle features. Stage 2 trains the
    rows of the novel classes alone ('head'), or the decoder too, whose batch normalisations stay as they are
    ('decoder').

    Args: those of `Network`.
    """

    title = 'PSPNet-FT'
    STAGE_1_PREFIXES = ('auxiliary.',)
    STAGE_2_PREFIXES = ('classifier_n.',)
    OPTIONS = MappingProxyType({
        'train': {'head': 'train the rows of the novel classes', 'decoder': "the decoder's convolutions too"},
    })  # fmt: skip

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, num_novel, **options)
        self.classifier = nn.Conv2d(decoder.out_channels, 1 + num_base, 1, bias=False)
        if num_novel:
            self.classifier_n = nn.Conv2d(decoder.out_channels, num_novel, 1, bias=False)

    @property
    def keeps_base(self) -> bool:
        """Whether stage 2 leaves the decoder as it is."""
        return self.options['train'] != 'decoder'

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, 1 + Kb + Kn, h, w]; in the training of stage 1 also those of the auxiliary head."""
        if not (self.training and self.auxiliary):
            return super().forward(images)
        features, middle, _ = self.features_and_layers(images)
        return self.classify({'features': features}), self.auxiliary(middle)

    def maps(self, images: torch.Tensor) -> Maps:
        """Of images [B, 3, H, W] the decoder's features, or those of the backbone where stage 2 trains the decoder."""
        if self.options['train'] == 'decoder':
            return {'backbone': self.backbone_features(images)}
        return super().maps(images)

    def map_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Shape (channels, h, w) of the `maps` of images of size (H, W)."""
        if self.options['train'] == 'decoder':
            return {'backbone': (self.backbone.out_channels, *self.feature_size(size))}
        return super().map_shapes(size)

    def finish_maps(self, maps: Maps) -> Maps:
        """Decode the backbone's features where the maps are these: the decoder pools over the whole map."""
        if 'backbone' not in maps:
            return maps
        weight = self.decoder.bottleneck[0].weight
        return {'features': self.decoder(maps['backbone'].to(weight.dtype))}

    def classify(self, maps: Maps, constants: None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of features [B, C, h, w], in float32 under autocast too."""
        with torch.autocast(self.classifier.weight.device.type, enabled=False):
            return F.conv2d(single(maps['features']), self._rows()[:, :, None, None])

    def _rows(self):
        """[1 + Kb + Kn, C]"""
        layers = (self.classifier, self.classifier_n) if self.num_novel else (self.classifier,)
        return torch.cat([layer.weight.flatten(1) for layer in layers])

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The rows of the base classes [Kb, C], followed by those of the novel ones [Kn, C] where there are any."""
        base, novel = self._rows()[1:].split([self.num_base, self.num_novel])
        return (base, novel) if self.num_novel else (base,)

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        return len(state['classifier.weight']) - 1, len(state.get('classifier_n.weight', ()))

    def start_base(self) -> None:
        """Add the auxiliary head."""
        classifier = nn.Conv2d(AUXILIARY_CHANNELS, 1 + self.num_base, 1)
        self.auxiliary = nn.Sequential(*auxiliary_head(self.backbone.middle_channels), classifier)

    def base_losses(
        self,
        outputs: tuple[torch.Tensor, torch.Tensor],
        masks: torch.Tensor,
        *,
        pixel_weight: float | None = None,
        micro_batches: int = 1,
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy 'ce' of the logits and 'aux', 0.4 times that of the auxiliary head's."""
        logits, auxiliary = outputs
        return {
            'ce': cross_entropy(logits, masks, pixel_weight),
            'aux': AUXILIARY_WEIGHT * cross_entropy(single(auxiliary), masks, pixel_weight),
        }

    def freeze_base(self) -> None:
        """Stage 2: train the rows of the novel classes and, where the options say so, the decoder's convolutions."""
        super().freeze_base()
        if self.options['train'] == 'decoder':
            self.decoder.requires_grad_(True)
            self.fix_batch_norm()
