"""Novel classes of a network of POP's in the joint space of the decoder's and the backbone's features.

Dimensions: B batch, C channels of the decoder, Kb base classes, Kn novel classes, h x w feature size.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from model.discriminants import Discriminants
from model.network import Labelled, Maps, labels_at, single
from model.pop import POP, as_map, score, vectors

KEPT_STRIDE = 16  # of the backbone's features: they have many channels, and are kept
FALSE_POSITIVE_RATE = 0.04  # calibration lets each novel class win this / (Kb + Kn) of the pixels of base classes


class JointSpace(POP):
    """What the methods share whose novel classes also see what the backbone knows: its features, and calibration.

    The decoder learns to tell base classes apart, and loses much of what would tell novel classes from each other; the
    backbone's features still have it. Background and base classes are scored as POP's stage 1 learned them.

    What is learned from a few images fits these images best, so that novel classes are overlooked elsewhere. Calibrated
    stacking (Chao et al., ECCV 2016) adds a constant to the scores of new classes. Here each class has its own, as
    large as base images allow (`calibrate`).

    A method defines `classify`, and may override what follows as properties.

    Args: those of `Network`.

    Attributes:
        discriminants: of all classes, in the joint space; None without novel classes, and where the method has none.
    """

    BASE_MODEL = 'pspnet_pop'
    OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType({
        'calibration': {'base': 'novel logits are raised as far as base images allow', 'none': 'not raised, as POP'},
    })  # fmt: skip
    STAGE_2_PREFIXES = ('novel_offset', 'discriminants.')

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, num_novel, **options)
        self.discriminants = None
        if num_novel and _has_discriminants(self.options):
            self.discriminants = Discriminants(decoder.out_channels + self.extra, num_base, num_novel)
        if self.calibrates:
            self.register_buffer('novel_offset', torch.zeros(num_novel))

    @classmethod
    def uses_base_views(cls, options: Mapping[str, str]) -> bool:
        """Whether discriminants or calibration look at them."""
        chosen = cls.choose(options)
        return _has_discriminants(chosen) or chosen['calibration'] == 'base'

    @property
    def extra(self) -> int:
        """Channels of the backbone's layers that novel classes also see: those of its last two layers."""
        return self.backbone.out_channels + self.backbone.middle_channels

    @property
    def pool(self) -> int:
        """Side of the squares of positions that the backbone's last layer is averaged over, to a stride of 16."""
        return max(KEPT_STRIDE // self.backbone.output_stride, 1)

    @property
    def fixed_background(self) -> bool:
        """Whether the background keeps the score of stage 1, which is then one of the maps."""
        return True

    @property
    def calibrates(self) -> bool:
        """Whether novel logits have offsets."""
        return self.num_novel > 0 and self.options['calibration'] == 'base'

    def maps(self, images: torch.Tensor) -> Maps:
        """POP's maps of images [B, 3, H, W], and where the options need them 'background' [B, 1, h, w], phi of the base
        residual, and 'backbone' [B, extra, h', w'], its last layer first, averaged to a stride of 16 where the layers'
        is finer."""
        features, middle, last = self.features_and_layers(images)
        maps = self.decompose(features)
        if self.fixed_background:
            maps['background'] = as_map(score(self.classifier, vectors(maps['residual']))[:, None], features)
        if self.extra:
            # the last layer may halve what the middle one has
            layers = [(last, self.pool), (middle, self.pool * max(self.backbone.output_stride // KEPT_STRIDE, 1))]
            averaged = [F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False) for x, side in layers]
            maps['backbone'] = torch.cat(averaged, dim=1)[:, : self.extra]
        return maps

    def map_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Shape (channels, h, w) of each of the `maps` of images of size (H, W)."""
        shapes, place = super().map_shapes(size), self.feature_size(size)
        if self.fixed_background:
            shapes['background'] = (1, *place)
        if self.extra:
            shapes['backbone'] = (self.extra, *(-(-side // self.pool) for side in place))
        return shapes

    def finish_maps(self, maps: Maps) -> Maps:
        """Project the backbone's features on what they are multiplied with, then enlarge them: the other order gives
        the same, but takes several times longer.

        Returns:
            POP's maps, and in place of 'backbone' what `project_backbone` gives, [B, ..., h, w].
        """
        if not (self.extra and self.num_novel):
            return maps
        backbone, (height, width) = maps['backbone'], maps['residual'].shape[2:]
        with torch.autocast(backbone.device.type, enabled=False):
            finished = {
                name: self.enlarged(as_map(x, backbone), (height, width))
                for name, x in self.project_backbone(vectors(backbone)).items()
            }
        return {name: value for name, value in maps.items() if name != 'backbone'} | finished

    def enlarged(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What was averaged over `pool` positions, [B, ..., h', w'], at the size (h, w) of the decoder's features."""
        if self.pool > 1:
            height, width = size  # pooling rounds up
            x = F.interpolate(x, scale_factor=float(self.pool), mode='bilinear')[:, :, :height, :width]
        return x

    def project_backbone(self, x: torch.Tensor) -> Maps:
        """What logits need of the backbone's features x [N, extra], float32.

        Returns:
            'discriminants' [N, 1 + Kb + Kn], their part of these, where there are any.
        """
        if self.discriminants is None:
            return {}
        return {'discriminants': x @ self.discriminants.weight[:, -self.extra :].T}

    def score_background(
        self, maps: Maps, r: torch.Tensor, novel: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """phi of what the base prototypes leave, [N]; or as `POP.score_background`."""
        if self.fixed_background:
            return vectors(maps['background'])[:, 0]
        return super().score_background(maps, r, novel)

    def calibrated(self, novel: torch.Tensor) -> torch.Tensor:
        """Novel logits [B, Kn, h, w] with their offsets."""
        return novel + self.novel_offset[:, None, None] if self.calibrates else novel

    @torch.no_grad()
    def calibrate(self, views: Iterable[Labelled]) -> None:
        """Raise the novel logits by offsets >= 0, from base images.

        Each class may win `FALSE_POSITIVE_RATE` / (Kb + Kn) of the pixels of base classes. Background does not count:
        base images may show novel classes there. Without a pixel of a base class, the offsets are 0.
        """
        if not self.calibrates:
            return
        self.eval()
        self.novel_offset.zero_()
        margins = []
        for maps, masks, _ in views:
            maps = self.finish_maps(maps)
            labels = labels_at(masks, maps['residual'].shape[2:]).flatten()
            is_base = (labels >= 1) & (labels <= self.num_base)
            logits = vectors(self.classify(maps))[is_base]  # [N, 1 + Kb + Kn]
            base, novel = logits.split([1 + self.num_base, self.num_novel], dim=1)
            margins.append(base[:, self.first_label :].amax(dim=1, keepdim=True) - novel)
        margins = torch.cat(margins)  # [N, Kn]
        if len(margins):
            # so many pixels have a smaller margin: these become novel
            wins = int(FALSE_POSITIVE_RATE / (self.num_base + self.num_novel) * len(margins))
            # sorted, as kthvalue is faster, but refused on GPUs by --deterministic
            self.novel_offset.copy_(margins.sort(dim=0).values[wins].clamp(min=0))

    def discriminant_margins(self, maps: Maps) -> torch.Tensor:
        """`Discriminants.margins` [B, Kn, h, w] of `finish_maps` in evaluation."""
        with torch.autocast(self.base_emb.device.type, enabled=False):
            p, r = vectors(maps['projections']), vectors(maps['residual'])
            scores = self.inner_products(p, r, self.discriminants.weight[:, : r.shape[1]])  # [N, 1 + Kb + Kn]
            scores = as_map(scores + self.discriminants.bias, maps['residual'])
            if self.extra:
                scores = scores + maps['discriminants']
            return self.discriminants.margins(scores, self.first_label)

    def fit_discriminants(self, supports: Iterable[Labelled], base_views: Iterable[Labelled]) -> None:
        """`Discriminants.fit` on the decoder's features, and the backbone's where novel classes see them."""
        self.discriminants.fit(
            *(
                ((self.joint_features(maps), self.coarse_labels(maps, masks), masks) for maps, masks, _ in images)
                for images in (base_views, supports)
            )
        )

    def joint_features(self, maps: Maps) -> torch.Tensor:
        """Features of `maps` as evaluation sees them, those of the decoder first, at every `pool`-th position:
        [B, C + extra, h', w'], float32."""
        with torch.autocast(self.base_emb.device.type, enabled=False):
            p, r = vectors(maps['projections']), vectors(maps['residual'])
            q = as_map(r + p @ F.normalize(self.base_emb, dim=1), maps['residual'])
            if self.extra:
                q = torch.cat([q, self.enlarged(single(maps['backbone']), q.shape[2:])], dim=1)
            return q[:, :, :: self.pool, :: self.pool]

    def coarse_labels(self, maps: Maps, masks: torch.Tensor) -> torch.Tensor:
        """Labels [B, h', w'] of masks [B, H, W] at the positions of `joint_features`."""
        return labels_at(masks, maps['residual'].shape[2:])[:, :: self.pool, :: self.pool]


def _has_discriminants(options):
    """Whether stage 2 adds discriminants: a method without this option always does."""
    return options.get('discriminants', 'added') == 'added'
