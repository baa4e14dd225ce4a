"""Linear discriminant analysis (LDA): classes as normal distributions that share one covariance.

Dimensions: K classes, D feature channels, N vectors.
"""

from collections.abc import Iterable

import torch
from torch import nn

from core.errors import InputError
from model.network import covered_mean
from model.pop import vectors

SHRINKAGE = 0.5  # of the covariance toward its diagonal
# The standard deviation of no channel counts as less than this share of the mean one: a channel that is silent in one
# set of images may speak up in another.
LEAST_STD = 0.1


class Discriminants(nn.Module):
    """Scores of all classes, D -> K: with means m_k, covariance S within classes, and frequencies c_k,

        d_k = m_k S^-1 f - m_k S^-1 m_k / 2 + log c_k,

    the logarithm of how likely class k is at a position with features f, up to a constant that all classes share.

    Args:
        channels: D.
        num_base, num_novel: Kb, Kn; K = 1 + Kb + Kn, background first.
    """

    def __init__(self, channels: int, num_base: int, num_novel: int) -> None:
        super().__init__()
        self.known, self.count = 1 + num_base, 1 + num_base + num_novel
        # all classes alike, until `fit`
        self.register_buffer('weight', torch.zeros(self.count, channels))
        self.register_buffer('bias', torch.zeros(self.count))

    @torch.no_grad()
    def fit(
        self,
        base_views: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        supports: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> None:
        """Take covariance, frequencies and means of background and base classes from base views, the means of novel
        classes from supports. The frequency of a novel class is the mean of those of the base classes.

        A class that the base views do not show is never likely.

        Args:
            base_views: features [B, D, h, w], their labels [B, h, w], and masks int64 [B, H, W].
            supports: the same, of all support images, in any number of batches.

        Raises:
            InputError: no base view has a label of a base class.
        """
        known, width, device = self.known, self.weight.shape[1], self.weight.device
        products = torch.zeros(width, width, dtype=torch.float64, device=device)
        counts, sums = products.new_zeros(known), products.new_zeros(known, width)
        for features, labels, _ in base_views:
            f, labels = vectors(features), labels.flatten()
            f, labels = f[labels < known], labels[labels < known]
            counts += labels.bincount(minlength=known)
            sums.index_add_(0, labels, f.double())
            products += (f.T @ f).double()
        if not counts[1:].any():
            raise InputError(
                'the base views show no pixel of a base class, apart from those of support images; raise --base-views'
            )
        means = sums / counts.clamp(min=1)[:, None]
        covariance = (products - means.T @ sums) / counts.sum()
        share = counts / counts.sum()
        means = torch.cat([means, self._novel_means(supports)])
        share = torch.cat([share, share[1:].mean().expand(len(means) - known)])
        std = covariance.diagonal().clamp(min=0).sqrt()
        diagonal = std.clamp(min=LEAST_STD * std.mean()) ** 2
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal.diag()
        weight = torch.linalg.solve(shrunk, means.T).T
        self.weight.copy_(weight)
        self.bias.copy_(share.log() - (weight * means).sum(dim=1) / 2)

    def _novel_means(self, supports):
        """[Kn, D]. A class too small for a position has the mean of those that it covers, weighted by coverage."""
        count = self.count - self.known
        counts, sums = self.weight.new_zeros(2, count), self.weight.new_zeros(2, *self.weight[self.known :].shape)
        for features, labels, masks in supports:
            f, labels = vectors(features), labels.flatten()
            for k in range(count):
                is_class = labels == self.known + k
                counts[0, k] += is_class.sum()
                sums[0, k] += f[is_class].sum(dim=0)
                where = masks == self.known + k
                if where.any():
                    counts[1, k] += 1
                    sums[1, k] += covered_mean(features, where)
        means = sums / counts.clamp(min=1)[:, :, None]
        return torch.where(counts[0, :, None] > 0, means[0], means[1]).double()

    def margins(self, scores: torch.Tensor, first_label: int = 0) -> torch.Tensor:
        """How much likelier the novel classes are than all others: scores [B, K, h, w] to [B, Kn, h, w].

        `first_label`: `Network.first_label`.
        """
        others = scores[:, first_label : self.known]
        return scores[:, self.known :] - others.amax(dim=1, keepdim=True)
