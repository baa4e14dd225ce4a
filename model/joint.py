"""A variant of POP's stage 2: prototypes in the joint space of the decoder's and the backbone's features.

Dimensions: B batch, C channels of the decoder, Kb base classes, Kn novel classes, h x w feature size.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F

from model.discriminants import LEAST_STD
from model.joint_space import JointSpace
from model.network import Labelled, Maps
from model.pop import POP, vectors

EVIDENCE = 0.1  # of discriminant analysis: the share of its margins that counts
DROPOUT = 0.8  # share of the backbone's values that --dropout leaves out of a step


class JointPOP(JointSpace):
    """POP whose novel classes also see what the backbone knows, and which leaves the background as stage 1 learned it.

    Novel prototypes are vectors of [q, z] with q the decoder's and z the backbone's features, standardised channel by
    channel. Base prototypes are padded with zeros, so that base logits stay those of POP; projections, residual and
    orthogonality are POP's in the joint space, and phi_n takes joint vectors.

    POP scores the background by phi_n on what all prototypes leave, and so learns it anew from a few supports. Here it
    is scored by phi on what the base prototypes leave, which is constant ('base'), or as in POP ('novel').

    From one image, a mean feature can say more than a training. So evaluation can add, with a small weight, how much
    likelier discriminant analysis calls a novel class than background and base classes (`Discriminants.margins`).

    Trained on a few images, prototypes may rely on a few channels. Dropout makes them use more (`--dropout backbone`).

    Untrained, the prototypes have zeros in the backbone's channels, and phi_n ignores these: the network then equals
    POP's, but for the background if it is 'base'.

    Args: those of `Network`.
    """

    title = 'POP, joint space'
    OPTIONS = MappingProxyType({
        'prototypes': {
            'joint': "in features of the decoder and of the backbone's last two layers",
            'last': "in those of the decoder and of the backbone's last layer", 'decoder': "in the decoder's, as POP",
        },
        'background': {'base': 'scored as stage 1 learned it', 'novel': 'learned anew, as POP'},
        'discriminants': {'none': 'not used, as POP', 'added': 'those of pspnet_lda count in evaluation'},
        'dropout': {'none': 'not used, as POP', 'backbone': "trained without four fifths of the backbone's values"},
        **JointSpace.OPTIONS,
    })  # fmt: skip
    STAGE_2_PREFIXES = (*POP.STAGE_2_PREFIXES, *JointSpace.STAGE_2_PREFIXES, 'backbone_mean', 'backbone_std')

    @classmethod
    def best_options(cls, shot: int) -> dict[str, str]:
        """With one image of a class, the discriminants; docs/methods.md has the results."""
        return {'discriminants': 'added' if shot == 1 else 'none'}

    def add_novel(self) -> None:
        """Add prototypes and phi_n in the joint space."""
        super().add_novel()
        if self.extra:
            self.register_buffer('backbone_mean', torch.zeros(self.extra))
            self.register_buffer('backbone_std', torch.ones(self.extra))

    @property
    def extra(self) -> int:
        """Channels of the backbone's layers that the novel prototypes also see: Cb + Cm, Cb or 0."""
        last, middle = self.backbone.out_channels, self.backbone.middle_channels
        return {'joint': last + middle, 'last': last, 'decoder': 0}[self.options['prototypes']]

    @property
    def fixed_background(self) -> bool:
        """Whether the background keeps the score of stage 1."""
        return self.options['background'] == 'base'

    def project_backbone(self, x: torch.Tensor) -> Maps:
        """What logits need of the backbone's features x [N, extra], float32.

        Returns:
            'novel' [N, Kn], projections of the standardised ones z on the novel prototypes; 'backbone' [N, extra], z,
            where the background needs it; and in evaluation 'discriminants' [N, 1 + Kb + Kn], their part of these.
        """
        z = (x - self.backbone_mean) / self.backbone_std
        if self.options['dropout'] == 'backbone':
            z = F.dropout(z, DROPOUT, self.training)
        s = F.normalize(self.novel_emb, dim=1)[:, -self.extra :]
        projected = {'novel': z @ s.T}
        if not self.fixed_background:
            projected['backbone'] = z
        return projected if self.training else projected | super().project_backbone(x)

    def novel_projections(self, maps: Maps, p: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """As `POP.novel_projections`, in the joint space."""
        projections = super().novel_projections(maps, p, r, s)
        return projections + vectors(maps['novel']) if self.extra else projections

    def score_background(
        self, maps: Maps, r: torch.Tensor, novel: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """phi of what the base prototypes leave, [N]; or as `POP.score_background`, in the joint space."""
        if self.extra and novel and not self.fixed_background:
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
