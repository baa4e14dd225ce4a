"""A variant of POP's stage 2: prototypes in the joint space of the decoder's and the backbone's features.

Dimensions: B batch, C channels of the decoder, Cb channels of the backbone, Kb base classes, Kn novel classes, h x w
feature size.
"""

from collections.abc import Iterable
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from core import IGNORE_INDEX
from model.losses import novel_losses
from model.network import Maps, single
from model.pop import POP, as_map, score, vectors

KEPT_STRIDE = 16  # of the backbone's features
LEAST_STD = 0.1  # of a channel, relative to the mean over channels
FALSE_ALARMS = 0.04  # of the pixels that a class has on average, the share that calibration lets a novel class win


class JointPOP(POP):
    """POP whose novel classes also see what the backbone knows, and which leaves the background as stage 1 learned it.

    The decoder learns to tell base classes apart, and loses much of what would tell novel classes from each other; the
    backbone's features still have it. Novel prototypes are vectors of [q, z] with q the decoder's and z the backbone's
    features, standardised channel by channel. Base prototypes are padded with zeros, so that base logits stay those of
    POP; projections, residual and orthogonality are POP's in the joint space, and phi_n takes joint vectors.

    POP scores the background by phi_n on what all prototypes leave, and so learns it anew from a few supports. Here it
    is scored by phi on what the base prototypes leave, which is constant ('base'), or as in POP ('novel').

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
        'prototypes': {'joint': "in decoder's and backbone's features", 'decoder': "in the decoder's, as POP"},
        'background': {'base': 'scored as stage 1 learned it', 'novel': 'learned anew, as POP'},
        'calibration': {'base': 'novel logits are raised as far as base images allow', 'none': 'not raised, as POP'},
    })  # fmt: skip
    STARTS_FROM_SUPPORTS = True
    STAGE_2_PREFIXES = ('novel_emb', 'classifier_n.', 'backbone_mean', 'backbone_std', 'novel_offset')

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, num_novel, **options)
        channels = decoder.out_channels
        self.extra = backbone.out_channels if self.options['prototypes'] == 'joint' else 0
        self.pool = max(KEPT_STRIDE // backbone.output_stride, 1)
        if num_novel and self.extra:
            self.classifier_n[0] = nn.Conv2d(channels + self.extra, channels, 1, bias=False)
            self.novel_emb = nn.Parameter(F.pad(self.novel_emb.detach(), (0, self.extra)))
            self.register_buffer('backbone_mean', torch.zeros(self.extra))
            self.register_buffer('backbone_std', torch.ones(self.extra))
            self.start_novel()
        if self.calibrates:
            self.register_buffer('novel_offset', torch.zeros(num_novel))

    @property
    def calibrates(self) -> bool:
        return self.num_novel > 0 and self.options['calibration'] == 'base'

    def maps(self, images: torch.Tensor) -> Maps:
        """Of images [B, 3, H, W] those of POP, and where the options need them 'background' [B, 1, h, w] and 'backbone'
        [B, Cb, h', w'], averaged to a stride of 16 where the backbone's is finer: it has many channels, and is kept."""
        backbone = self.backbone(images)
        maps = self.decompose(self.decoder(backbone))
        if self.extra:
            maps['backbone'] = F.avg_pool2d(backbone, self.pool, ceil_mode=True, count_include_pad=False)
        if self.options['background'] == 'base':
            maps['background'] = as_map(score(self.classifier, vectors(maps['residual']))[:, None], backbone)
        return maps

    def map_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Shape (channels, h, w) of each of the `maps` of images of size (H, W)."""
        shapes, place = super().map_shapes(size), self.feature_size(size)
        if self.extra:
            shapes['backbone'] = (self.extra, *(-(-side // self.pool) for side in place))
        if self.options['background'] == 'base':
            shapes['background'] = (1, *place)
        return shapes

    def finish_maps(self, maps: Maps) -> Maps:
        """Enlarge the backbone's map to the size of the others."""
        if self.extra and self.pool > 1:
            height, width = maps['residual'].shape[2:]
            larger = F.interpolate(single(maps['backbone']), scale_factor=float(self.pool), mode='bilinear')
            maps = maps | {'backbone': larger[:, :, :height, :width]}  # pooling rounds up
        return maps

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of `maps`, as `POP.classify`; in training, without the offset."""
        with torch.autocast(self.base_emb.device.type, enabled=False):
            p, r = vectors(maps['projections']), vectors(maps['residual'])  # [N, Kb], [N, C]
            if self.num_novel:
                s_base, s_novel = (F.normalize(prototypes, dim=1) for prototypes in self.prototypes())
                known, extra = s_novel.split([r.shape[1], self.extra], dim=1)
                p_novel = r @ known.T + p @ (s_base @ s_novel.T)  # [N, Kn]
                if self.extra:
                    z = (vectors(maps['backbone']) - self.backbone_mean) / self.backbone_std  # [N, Cb]
                    p_novel = p_novel + z @ extra.T
                p = torch.cat([p, p_novel], dim=1)
            toward, away = constants or self.constants()  # [K]
            logits = F.relu(p) * toward + F.relu(-p) * away  # [N, K]
            if self.options['background'] == 'novel' and self.num_novel:
                r = (torch.cat([r, z], dim=1) if self.extra else r) - p_novel @ s_novel
        if self.options['background'] == 'base':
            background = vectors(maps['background'])[:, 0]
        else:
            background = score(self._background_mlp, r)  # [N]
        logits = torch.cat([background.to(logits.dtype)[:, None], logits], dim=1)
        if self.calibrates and not self.training:
            logits = logits + F.pad(self.novel_offset, (1 + self.num_base, 0))
        return as_map(logits, maps['residual'])

    @torch.no_grad()
    def calibrate(self, views: Iterable[tuple[Maps, torch.Tensor]]) -> None:
        """Raise the novel logits by offsets >= 0, from base images.

        Each class may win `FALSE_ALARMS` / (Kb + Kn) of the pixels of base classes. Background does not count: base
        images may show novel classes there.
        """
        self.eval()
        self.novel_offset.zero_()
        margins = []
        for maps, masks in views:
            maps = self.finish_maps(maps)
            labels = labels_of(masks, maps['residual'])
            is_base = (labels >= 1) & (labels <= self.num_base)
            logits = vectors(self.classify(maps))[is_base]  # [N, 1 + Kb + Kn]
            base, novel = logits.split([1 + self.num_base, self.num_novel], dim=1)
            if not self.background:  # evaluation never predicts it
                base = base[:, 1:]
            margins.append(base.amax(dim=1, keepdim=True) - novel)
        margins = torch.cat(margins)  # [N, Kn]
        if len(margins):
            # so many pixels have a smaller margin: these become novel
            wins = int(FALSE_ALARMS / (self.num_base + self.num_novel) * len(margins))
            self.novel_offset.copy_(margins.sort(dim=0).values[wins].clamp(min=0))

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """Those of the base classes, followed by those of the novel ones where there are any, in the joint space."""
        return (F.pad(self.base_emb, (0, self.extra)), self.novel_emb) if self.num_novel else (self.base_emb,)

    def novel_losses(self, logits: torch.Tensor, masks: torch.Tensor, **weights) -> dict[str, torch.Tensor]:
        """`losses.novel_losses`, in the joint space."""
        base, novel = self.prototypes()
        return novel_losses(logits, masks, novel, base, **weights)

    def start_novel(self) -> None:
        """Start phi_n from phi; it ignores the backbone's channels."""
        state = self.classifier.state_dict()
        weight = state['0.weight']  # [C, C, 1, 1]
        missing = self.classifier_n[0].in_channels - weight.shape[1]
        state['0.weight'] = F.pad(weight, (0, 0, 0, 0, 0, missing))
        self.classifier_n.load_state_dict(state)

    @torch.no_grad()
    def start_from_supports(self, supports: Iterable[tuple[Maps, torch.Tensor]]) -> None:
        """Take mean and standard deviation of the backbone's channels over the support images.

        Args:
            supports: for each novel class `maps` of its images, and masks int64 [B, H, W]; 255 counts as no image.
        """
        if not self.extra:
            return
        count, total, squares = 0, 0, 0
        for maps, masks in supports:
            seen = vectors(maps['backbone'])[labels_of(masks, maps['backbone']) != IGNORE_INDEX].double()
            count, total, squares = count + len(seen), total + seen.sum(dim=0), squares + seen.square().sum(dim=0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.backbone_mean.copy_(mean)
        # a channel that is silent here may speak up elsewhere
        self.backbone_std.copy_(std.clamp(min=LEAST_STD * std.mean()))


def labels_of(masks: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Labels of the positions of maps [B, C, h, w] by masks [B, H, W], float [B h w]."""
    return F.interpolate(masks[:, None].float(), maps.shape[2:], mode='nearest').flatten()
