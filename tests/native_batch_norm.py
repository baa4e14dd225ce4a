"""What PyTorch's CUDA operations of synchronised batch normalisation compute, from their definition, for any device.

Statistics of half precision are float32, results have the type of x.

Dimensions: B batch, C channels, P processes.
"""

import torch

OVER = (0, 2, 3)  # the dimensions of [B, C, h, w] that statistics are over


def register(key: str) -> torch.library.Library:
    """Make them what PyTorch calls for a dispatch key, 'CPU' or 'Meta' (shapes), as long as the result lives."""
    library = torch.library.Library('aten', 'IMPL')
    for operation in (
        batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):  # fmt: skip
        library.impl(operation.__name__, operation, key)
    return library


def batch_norm_stats(x, eps):
    variance, mean = torch.var_mean(_accumulated(x), OVER, correction=0)
    return mean, torch.rsqrt(variance + eps)


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    counts, total = counts[:, None], counts.sum()  # [P, 1]
    mean = (counts * means).sum(0) / total
    variance = (counts * (invstds**-2 - eps + (means - mean) ** 2)).sum(0) / total
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, torch.rsqrt(variance + eps)


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return (_widen(weight * invstd) * (x - _widen(mean)) + _widen(bias)).to(x.dtype)


def batch_norm_backward_reduce(gradient, x, mean, invstd, weight, input_g, weight_g, bias_g):
    gradient = _accumulated(gradient)
    sum_dy = gradient.sum(OVER)
    sum_dy_xmu = (gradient * (x - _widen(mean))).sum(OVER)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(gradient, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    total = counts.sum()
    shared = _widen(sum_dy / total) + (x - _widen(mean)) * _widen(invstd**2 * sum_dy_xmu / total)
    return (_widen(weight * invstd) * (gradient - shared)).to(x.dtype)


def _widen(values):
    """[C] to [C, 1, 1]."""
    return values[:, None, None]


def _accumulated(x):
    return x if x.dtype == torch.float64 else x.float()
