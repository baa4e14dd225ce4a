"""A variant of POP's stage 2: prototypes in the joint space of the decoder's and the backbone's features.

Dimensions: B batch, C channels of the decoder, Cb channels of the backbone, Kb base classes, Kn novel classes, h x w
feature size.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from model.discriminants import Discriminants
from model.network import Labelled, Maps, labels_at, single
from model.pop import POP, as_map, score, vectors

KEPT_STRIDE = 16  # of the backbone's features: they have many channels, and are kept
LEAST_STD = 0.1  # the standard deviation of no channel counts as less than this share of the mean one
EVIDENCE = 0.1  # of discriminant analysis: the share of its margins that counts
FALSE_ALARMS = 0.04  # calibration lets each novel class win this / (Kb + Kn) of the pixels of base classes


def best_options(shot: int) -> dict[str, str]:
    """Options of `JointPOP` that gave the best results with so many images of a class (docs/extend.md)."""
    return {'discriminants': 'added' if shot == 1 else 'none'}


class JointPOP(POP):
    """POP whose novel classes also see what the backbone knows, and which leaves the background as stage 1 learned it.

    The decoder learns to tell base classes apart, and loses much of what would tell novel classes from each other; the
    backbone's features still have it. Novel prototypes are vectors of [q, z] with q the decoder's and z the backbone's
    features, standardised channel by channel. Base prototypes are padded with zeros, so that base logits stay those of
    POP; projections, residual and orthogonality are POP's in the joint space, and phi_n takes joint vectors.

    POP scores the background by phi_n on what all prototypes leave, and so learns it anew from a few supports. Here it
    is scored by phi on what the base prototypes leave, which is constant ('base'), or as in POP ('novel').

    From one image, a mean feature can say more than a training. So evaluation can add, with a small weight, how much
    likelier discriminant analysis calls a novel class than background and base classes (`Discriminants.margins`).

    What is learned from a few images fits these images best, so that novel classes are overlooked elsewhere. Calibrated
    stacking (Chao et al., ECCV 2016) adds a constant to the scores of new classes. Here each class has its own, as
    large as base images allow (`calibrate`).

    Untrained, the prototypes have zeros in the backbone's channels, and phi_n ignores these: the network then equals
    POP's, but for the background if it is 'base'.

    Args: those of `Network`.
    """

    title = 'POP, joint space'
    BASE_MODEL = 'pspnet_pop'
    OPTIONS = MappingProxyType({
        'prototypes': {
            'joint': "in features of the decoder and of the backbone's last two layers",
            'last': "in those of the decoder and of the backbone's last layer", 'decoder': "in the decoder's, as POP",
        },
        'background': {'base': 'scored as stage 1 learned it', 'novel': 'learned anew, as POP'},
        'discriminants': {'none': 'not used, as POP', 'added': 'those of pspnet_lda count in evaluation'},
        'calibration': {'base': 'novel logits are raised as far as base images allow', 'none': 'not raised, as POP'},
    })  # fmt: skip
    USES_BASE_VIEWS = True
    STAGE_2_PREFIXES = (
        'novel_emb', 'classifier_n.', 'backbone_mean', 'backbone_std', 'novel_offset', 'discriminants.',
    )  # fmt: skip

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, num_novel, **options)
        self.pool = max(KEPT_STRIDE // backbone.output_stride, 1)
        if num_novel and self.extra:
            self.register_buffer('backbone_mean', torch.zeros(self.extra))
            self.register_buffer('backbone_std', torch.ones(self.extra))
        self.discriminants = None
        if num_novel and self.options['discriminants'] == 'added':
            self.discriminants = Discriminants(decoder.out_channels + self.extra, num_base, num_novel)
        if self.calibrates:
            self.register_buffer('novel_offset', torch.zeros(num_novel))

    @property
    def extra(self) -> int:
        """Channels of the backbone's layers that the novel prototypes also see: Cb + Cm, Cb or 0."""
        last, middle = self.backbone.out_channels, self.backbone.middle_channels
        return {'joint': last + middle, 'last': last, 'decoder': 0}[self.options['prototypes']]

    @property
    def fixed_background(self) -> bool:
        """Whether the background keeps the score of stage 1."""
        return self.options['background'] == 'base'

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
            'novel' [N, Kn], projections of the standardised ones z on the novel prototypes; 'backbone' [N, extra], z,
            where the background needs it; and in evaluation 'discriminants' [N, 1 + Kb + Kn], their part of these.
        """
        z = (x - self.backbone_mean) / self.backbone_std
        s = F.normalize(self.novel_emb, dim=1)[:, -self.extra :]
        projected = {'novel': z @ s.T}
        if not self.fixed_background:
            projected['backbone'] = z
        if self.discriminants is not None and not self.training:
            projected['discriminants'] = x @ self.discriminants.weight[:, -self.extra :].T
        return projected

    def novel_projections(self, maps: Maps, p: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """As `POP.novel_projections`, in the joint space."""
        projections = super().novel_projections(maps, p, r, s)
        return projections + vectors(maps['novel']) if self.extra else projections

    def score_background(
        self, maps: Maps, r: torch.Tensor, novel: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """phi of what the base prototypes leave, [N]; or as `POP.score_background`, in the joint space."""
        if self.fixed_background:
            return vectors(maps['background'])[:, 0]
        if self.extra and novel:
            r = torch.cat([r, vectors(maps['backbone'])], dim=1)
        return super().score_background(maps, r, novel)

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] as `POP.classify`; in evaluation, discriminants and offsets are added."""
        logits = super().classify(maps, constants)
        if self.training or not self.num_novel:
            return logits
        base, novel = logits.split([1 + self.num_base, self.num_novel], dim=1)
        if self.discriminants is not None:
            novel = novel + EVIDENCE * self.discriminant_margins(maps)
        return torch.cat([base, self.calibrated(novel)], dim=1)

    def calibrated(self, novel: torch.Tensor) -> torch.Tensor:
        """Novel logits [B, Kn, h, w] with their offsets."""
        return novel + self.novel_offset[:, None, None] if self.calibrates else novel

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

    def inherited(self, state: Mapping[str, torch.Tensor], classes: Sequence[int]) -> dict[str, torch.Tensor]:
        """What stage 2 adds, of an earlier network.

        Args:
            state: of the earlier network.
            classes: which of its novel classes are the first ones here; the other classes stay as they are here.
        """
        own = self.state_dict()
        taken = {key: value for key, value in state.items() if key.startswith(self.STAGE_2_PREFIXES) and key in own}
        # a row for each novel class, of discriminants behind those of background and base classes
        behind = 1 + self.num_base
        rows_before = {
            'novel_emb': 0, 'novel_offset': 0, 'discriminants.weight': behind, 'discriminants.bias': behind
        }  # fmt: skip
        for key in taken.keys() & rows_before.keys():
            before = rows_before[key]
            rows = [*range(before), *(before + label for label in classes)]
            taken[key] = own[key].clone()
            taken[key][: len(rows)] = state[key][rows]
        return taken

    @torch.no_grad()
    def calibrate(self, views: Iterable[Labelled]) -> None:
        """Raise the novel logits by offsets >= 0, from base images.

        Each class may win `FALSE_ALARMS` / (Kb + Kn) of the pixels of base classes. Background does not count: base
        images may show novel classes there. Without a pixel of a base class, the offsets are 0.
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
            wins = int(FALSE_ALARMS / (self.num_base + self.num_novel) * len(margins))
            self.novel_offset.copy_(margins.sort(dim=0).values[wins].clamp(min=0))

    @torch.no_grad()
    def start_from_supports(self, supports: Iterable[Labelled], base_views: Iterable[Labelled]) -> None:
        """Take mean and standard deviation of the backbone's channels over all positions of the support images, and fit
        the discriminants."""
        if self.discriminants is not None:
            self.fit_discriminants(supports, base_views)
        if not self.extra:
            return
        count, total, squares = 0, 0, 0
        for maps, masks, shapes in supports:
            inside = torch.zeros_like(masks)
            for image, (height, width) in zip(inside, shapes, strict=True):
                image[:height, :width] = 1
            inside = self.coarse_labels(maps, inside).flatten() == 1
            seen = vectors(maps['backbone'])[inside].double()
            count, total, squares = count + len(seen), total + seen.sum(dim=0), squares + seen.square().sum(dim=0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.backbone_mean.copy_(mean)
        # a channel that is silent here may speak up elsewhere
        self.backbone_std.copy_(std.clamp(min=LEAST_STD * std.mean()))
