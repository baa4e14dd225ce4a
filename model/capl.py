"""CAPL: context-aware prototype learning (Tian et al., CVPR 2022).

Every class, background first, has a prototype p, and a logit is 10 cos(f, p) for a feature vector f.

Dimensions: B batch, C feature channels, Kb base classes, Kn novel classes, K = 1 + Kb rows of prototypes that training
learns, h x w feature size, H x W mask size.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from model.losses import cross_entropy
from model.network import (
    AUXILIARY_CHANNELS,
    AUXILIARY_WEIGHT,
    Labelled,
    Maps,
    Network,
    auxiliary_head,
    covered_mean,
    single,
)

SCALE = 10.0


class CAPL(Network):
    """Segmenter whose prototypes take in the context of support images and of the image that is segmented.

    Stage 1 learns prototypes p_k that can be mixed with what images show. The second half of a batch serves as fake
    supports (`enriched`): some classes are treated as novel, so their mean features replace their prototypes; other
    prototypes become g p + (1 - g) m, with m the mean feature and g = sigmoid(MLP([p, m])). Every image enriches its
    own prototypes too (`refined`).

    Stage 2 takes no steps: it registers the novel classes, pooling their prototypes from their supports
    (`start_from_supports`).

    Args: those of `Network`.
    """

    title = 'CAPL'
    STAGE_1_PREFIXES = ('auxiliary.', 'auxiliary_proto')
    STAGE_2_PREFIXES = ('registered',)
    POSITIONWISE = False
    BASE_LEARNING_RATE = 1e-2
    BATCH_UNIT = 2
    TRAINS_NOVEL = False

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0) -> None:
        super().__init__(backbone, decoder, num_base, num_novel)
        channels = decoder.out_channels
        self.proto = nn.Parameter(torch.randn(1 + num_base, channels))
        self.mlp = nn.Sequential(nn.Linear(2 * channels, channels, bias=False), nn.ReLU(), nn.Linear(channels, 1))
        if num_novel:
            self.register_buffer('registered', torch.zeros(self.num_logits, channels))

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, 1 + Kb + Kn, h, w]; in the training of stage 1 features and the auxiliary head's logits."""
        if not (self.training and self.auxiliary):
            return super().forward(images)
        features, middle, _ = self.features_and_layers(images)
        return features, cosine_logits(self.auxiliary(middle), self.auxiliary_proto)

    def classify(self, maps: Maps, constants: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of features [B, C, h, w], whose positions must all show the image."""
        with torch.autocast(self.proto.device.type, enabled=False):
            features = single(maps['features'])
            rows = self.constants() if constants is None else constants
            base, novel = rows.split([1 + self.num_base, self.num_novel])
            base = base + self.refined(features)  # [B, K, C]
            return cosine_logits(features, torch.cat([base, novel.expand(len(base), -1, -1)], dim=1))

    def constants(self) -> torch.Tensor:
        """The prototypes that do not depend on the image, [1 + Kb + Kn, C], normalised."""
        return F.normalize(self.registered if self.num_novel else self.proto, dim=1)

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The prototypes of the base classes [Kb, C], followed by those of the novel ones [Kn, C]."""
        base, novel = self.constants()[1:].split([self.num_base, self.num_novel])
        return (base, novel) if self.num_novel else (base,)

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        rows = len(state['proto'])
        return rows - 1, len(state.get('registered', state['proto'])) - rows

    def start_base(self) -> None:
        """Add the auxiliary head, which has prototypes of its own."""
        self.auxiliary = auxiliary_head(self.backbone.middle_channels)
        self.auxiliary_proto = nn.Parameter(torch.randn(1 + self.num_base, AUXILIARY_CHANNELS))

    def base_losses(
        self,
        outputs: tuple[torch.Tensor, torch.Tensor],
        masks: torch.Tensor,
        *,
        pixel_weight: float | None = None,
        micro_batches: int = 1,
    ) -> dict[str, torch.Tensor]:
        """Half the cross-entropy with prototypes that fake supports and each image itself have enriched, 'ce'; half
        that with those that the fake supports alone have, 'ce_support'; and 0.4 times the auxiliary head's, 'aux'.
        """
        features, auxiliary = single(outputs[0]), single(outputs[1])
        half = len(features) // 2
        enriched = self.enriched(features[half:], masks[half:], torch.rand(1 + self.num_base))
        refined = enriched + self.refined(features)
        return {
            'ce': 0.5 * cross_entropy(cosine_logits(features, refined), masks, pixel_weight),
            'ce_support': 0.5 * cross_entropy(cosine_logits(features, enriched), masks, pixel_weight),
            'aux': AUXILIARY_WEIGHT * cross_entropy(auxiliary, masks, pixel_weight),
        }

    def enriched(self, features: torch.Tensor, masks: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Prototypes that fake supports have enriched.

        Of the foreground classes that they show, half (rounded down) are treated as novel: those with the lowest draws.
        The others are context, and so is the background with probability 1/2.

        Args:
            features: [B, C, h, w].
            masks: int64 [B, H, W].
            draws: random numbers in [0, 1), [K].

        Returns:
            [K, C].
        """
        p = F.normalize(self.proto, dim=1)
        m, count = label_means(F.normalize(features, dim=1), masks, len(p))
        shown, draws = count > 0, draws.to(p)
        foreground = shown.clone()
        foreground[0] = False
        places = torch.where(foreground, draws, 2).argsort().argsort()  # foreground classes by their draws
        novel = foreground & (places < foreground.sum() // 2)
        context = shown & ~novel
        context[0] &= draws[0] < 0.5
        # all classes go through the MLP, so that its parameters have a gradient in every process and step
        return torch.where(novel[:, None], m, torch.where(context[:, None], self.mixed(p, m), p))

    def mixed(self, p: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """g p + (1 - g) m with g = sigmoid(MLP([p, m])), for rows [K, C]."""
        gate = self.mlp(torch.cat([p, m], dim=1)).sigmoid()  # [K, 1]
        return gate * p + (1 - gate) * m

    def refined(self, features: torch.Tensor) -> torch.Tensor:
        """Prototypes that each image has enriched for itself.

        A softmax over positions of its logits gives a mean feature g_k of each class. With w_k = max(cos(g_k, p_k), 0),
        the prototype becomes w_k g_k + (1 - w_k) p_k.

        Args:
            features: [B, C, h, w].

        Returns:
            [B, K, C].
        """
        p = F.normalize(self.proto, dim=1)
        f = F.normalize(features, dim=1).flatten(2)  # [B, C, h*w]
        attention = (SCALE * (p @ f)).softmax(dim=2)  # [B, K, h*w]
        g = attention @ f.transpose(1, 2)  # [B, K, C]
        w = F.cosine_similarity(g, p, dim=2).clamp(min=0)[:, :, None]
        return w * g + (1 - w) * p

    @torch.no_grad()
    def start_from_supports(self, supports: Iterable[Labelled], base_views: Iterable[Labelled]) -> None:
        """Pool the prototypes of novel classes from their supports, and enrich those of base classes with them.

        A novel class gets the mean feature of its pixels in its own supports. These also give a mean feature of
        background and base classes, where they show them, and the prototype where they do not. The means of these over
        the novel classes are mixed with the prototypes (`mixed`).

        Args:
            supports: the support images of each novel class, in the order of the labels.
            base_views: not used.
        """
        novel, context = [], []
        for label, (maps, masks, _) in enumerate(supports, len(self.proto)):
            features = single(maps['features'])
            m, count = label_means(features, masks, self.num_logits)
            novel.append(m[label] if count[label] else covered_mean(features, masks == label))
            context.append(torch.where(count[: len(self.proto), None] > 0, m[: len(self.proto)], self.proto))
        m = F.normalize(torch.stack(context).mean(dim=0), dim=1)
        base = self.mixed(F.normalize(self.proto, dim=1), m)
        self.registered.copy_(F.normalize(torch.cat([base, torch.stack(novel)]), dim=1))


def cosine_logits(features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """10 cos(f, p): [B, K, h, w] for features [B, C, h, w] and prototypes [K, C], or [B, K, C] of each image."""
    f = F.normalize(single(features), dim=1)
    return SCALE * (F.normalize(prototypes, dim=-1) @ f.flatten(2)).unflatten(2, f.shape[2:])


def label_means(features: torch.Tensor, masks: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean features of labels over all images, with masks at the features' size (nearest).

    Args:
        features: [B, C, h, w].
        masks: int64 [B, H, W].
        num_labels: K.

    Returns:
        Means [K, C], 0 for labels without a position; numbers of positions [K].
    """
    small = F.interpolate(masks[:, None].float(), features.shape[2:], mode='nearest')  # [B, 1, h, w]
    is_label = (small == torch.arange(num_labels, device=masks.device)[:, None, None]).to(features)  # [B, K, h, w]
    sums = (is_label.flatten(2) @ features.flatten(2).transpose(1, 2)).sum(dim=0)  # [K, C]
    count = is_label.sum(dim=(0, 2, 3))
    return sums / count.clamp(min=1)[:, None], count
