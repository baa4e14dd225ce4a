"""Linear discriminant analysis (LDA) on the features of POP's base network: novel classes without training.

Dimensions: B batch, C channels of the decoder, Cb of the backbone, D = C + Cb, Kb base classes, Kn novel classes,
h x w feature size, h' x w' that of the kept map of the backbone.
"""

from collections.abc import Iterable
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from model.joint import JointPOP
from model.network import Labelled, Maps, covered_mean, labels_at, single
from model.pop import POP, as_map, vectors

SHRINKAGE = 0.5  # of the covariance toward its diagonal


class LDA(JointPOP):
    """Classes as normal distributions with one covariance, which base views say; a novel class needs a mean only.

    A feature vector f = [q, z] joins the decoder's and the backbone's features. With the means m_k of the classes, the
    covariance S within background and base classes, shrunk toward its diagonal, and the frequencies c_k of the classes,

        d_k = m_k S^-1 f - m_k S^-1 m_k / 2 + log c_k

    is the logarithm of how likely class k is, up to a constant. A novel class has the mean frequency of a base class.
    Background and base classes keep their logits of stage 1. A novel class wins where it is likelier than all of them:

        logit_k = max of the logits of stage 1 + d_k - max of d over background and base classes

    and is then calibrated as in `JointPOP`. Nothing is trained by gradients.

    Args: those of `Network`.
    """

    title = 'LDA'
    OPTIONS = MappingProxyType({'calibration': JointPOP.OPTIONS['calibration']})
    STARTS_FROM_SUPPORTS = False
    REGISTERS = True
    STAGE_2_PREFIXES = ('discriminants.', 'novel_offset')

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, 0, **options)
        self.num_novel = num_novel
        if num_novel:
            self.discriminants = nn.Linear(decoder.out_channels + self.extra, self.num_logits)  # d
        if self.calibrates:
            self.register_buffer('novel_offset', torch.zeros(num_novel))

    @property
    def extra(self) -> int:
        """Cb."""
        return self.backbone.out_channels

    @property
    def fixed_background(self) -> bool:
        """The background keeps the score of stage 1."""
        return True

    def start_novel(self) -> None:
        """There is nothing to start from: `register` makes all of it."""

    def finish_maps(self, maps: Maps) -> Maps:
        """Multiply the backbone's features with their part of the discriminants, then enlarge.

        Returns:
            POP's maps, with 'discriminants' [B, 1 + Kb + Kn, h, w] in place of 'backbone'.
        """
        if not self.num_novel:
            return maps
        backbone = maps['backbone']
        with torch.autocast(backbone.device.type, enabled=False):
            part = as_map(vectors(backbone) @ self.discriminants.weight[:, -self.extra :].T, backbone)
            finished = {'discriminants': self.enlarge(part, maps['residual'].shape[2:])}
        return {name: value for name, value in maps.items() if name != 'backbone'} | finished

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [B, 1 + Kb + Kn, h, w] of `finish_maps`; in evaluation, novel ones with their offsets."""
        logits = POP.classify(self, maps, constants)  # of stage 1
        if not self.num_novel:
            return logits
        known = 1 + self.num_base
        with torch.autocast(logits.device.type, enabled=False):
            weight = self.discriminants.weight[:, : -self.extra].T  # [C, 1 + Kb + Kn]
            p, r = vectors(maps['projections']), vectors(maps['residual'])
            d = r @ weight + p @ (F.normalize(self.base_emb, dim=1) @ weight) + self.discriminants.bias
            d = as_map(d, logits) + maps['discriminants']
            if not self.background:  # there is none to be told from
                logits, d = logits.clone(), d.clone()
                logits[:, 0], d[:, 0] = -torch.inf, -torch.inf
            best, likeliest = (values[:, :known].amax(dim=1, keepdim=True) for values in (logits, d))
            novel = best + d[:, known:] - likeliest
            if self.calibrates and not self.training:
                novel = novel + self.novel_offset[:, None, None]
            return torch.cat([logits, novel], dim=1)

    @torch.no_grad()
    def register(self, supports: Iterable[Labelled], base_views: Iterable[Labelled] = ()) -> None:
        """Base views give means and covariance of background and base classes, supports the means of novel classes.

        A class that the base views do not show is never likelier than another.
        """
        known, width = 1 + self.num_base, self.discriminants.in_features
        products = torch.zeros(width, width, dtype=torch.float64, device=self.base_emb.device)
        counts, sums = products.new_zeros(known), products.new_zeros(known, width)
        for maps, masks, _ in base_views:
            f, labels = self._features(maps), labels_at(masks, maps['backbone'].shape[2:]).flatten()
            seen = labels < known
            f, labels = vectors(f)[seen], labels[seen]
            counts += labels.bincount(minlength=known)
            sums.index_add_(0, labels, f.double())
            products += (f.T @ f).double()
        means = sums / counts.clamp(min=1)[:, None]
        covariance = (products - means.T @ sums) / counts.sum()
        novel = []
        for label, (maps, masks, _) in enumerate(supports, known):
            f = self._features(maps)
            shown = vectors(f)[labels_at(masks, f.shape[2:]).flatten() == label]
            novel.append((shown.mean(dim=0) if len(shown) else covered_mean(f, masks == label)).double())
        means = torch.cat([means, torch.stack(novel)])
        share = counts / counts.sum()
        share = torch.cat([share, share[1:].mean().expand(len(novel))])
        diagonal = covariance.diagonal().clamp(min=1e-6 * covariance.diagonal().mean())
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal.diag()
        weight = torch.linalg.solve(shrunk, means.T).T
        self.discriminants.weight.copy_(weight)
        self.discriminants.bias.copy_(share.log() - (weight * means).sum(dim=1) / 2)

    def _features(self, maps):
        """f of maps, at the positions of the backbone's map: [B, D, h', w'], float32."""
        with torch.autocast(self.base_emb.device.type, enabled=False):
            p, r = vectors(maps['projections']), vectors(maps['residual'])
            q = as_map(r + p @ F.normalize(self.base_emb, dim=1), maps['residual'])
            q = F.avg_pool2d(q, self.pool, ceil_mode=True, count_include_pad=False)
            return torch.cat([q, single(maps['backbone'])], dim=1)

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The discriminants of the base classes [Kb, D], followed by those of the novel ones where there are any."""
        if not self.num_novel:
            return (self.base_emb,)
        base, novel = self.discriminants.weight[1:].split([self.num_base, self.num_novel])
        return base, novel

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        num_base = len(state['base_emb'])
        return num_base, len(state['discriminants.bias']) - 1 - num_base if 'discriminants.bias' in state else 0
