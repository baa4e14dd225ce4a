"""Batch normalisation over the batches of all processes, for CUDA.

Unlike `nn.SyncBatchNorm`, it expects that no process has an empty batch. That class looks for such processes in every
forward pass of every layer, and the host waits there for the GPU.

PyTorch's CUDA operations compute the statistics. Processes exchange them inside two operations that are opaque to
torch.compile, so a layer does not break its graph. The number of processes is an argument, because a result has its
size: torch.compile keeps graphs on disk, and one of two processes must not be taken for one of four.

Dimensions: B batch of this process, C channels, P processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.ranks import world_size

OPERATIONS = torch.library.Library('pop', 'DEF')
OPERATIONS.define(
    'sync_batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, '
    'float momentum, float eps, int processes) -> (Tensor, Tensor, Tensor, Tensor)'
)
OPERATIONS.define(
    'sync_batch_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor mean, Tensor invstd, Tensor counts) '
    '-> (Tensor, Tensor, Tensor)'
)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation whose training statistics are those of all processes' batches together.

    In eval mode it is the batch normalisation that it replaces.

    Args:
        norm: a batch normalisation that `fits`; settings, parameters and running statistics are taken over.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device='meta')
        self.weight, self.bias, self.training = norm.weight, norm.bias, norm.training
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is a batch normalisation with all that PyTorch's default has."""
        return type(module) is nn.BatchNorm2d and (
            module.affine and module.track_running_stats and module.momentum is not None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, h, w]; B may differ between processes, but must not be 0."""
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        x = x.contiguous(memory_format=torch.channels_last)  # as the network's tensors are
        return torch.ops.pop.sync_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, world_size()
        )[0]


class _SyncBatchNorm(torch.autograd.Function):
    """What the operation does where gradients are recorded.

    The operation calls this function. A layer that called it would put a graph into the graph of torch.compile, and
    older PyTorch does not compile such graphs under DistributedDataParallel.
    """

    @staticmethod
    def forward(ctx, x, weight, *others):
        with torch._C._AutoDispatchBelowAutograd():
            y, *statistics = torch.ops.pop.sync_batch_norm(x, weight, *others)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx, gradient, *_):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return *torch.ops.pop.sync_batch_norm_backward(gradient, *ctx.saved_tensors), None, None, None, None, None


def _normalize(x, weight, bias, running_mean, running_var, momentum, eps, processes):
    """Normalise x and update the running statistics.

    Returns:
        y, like x; mean and 1 / sqrt(variance + eps) over all processes, [C]; pixels of each process, int32 [P].
    """
    mean, invstd = torch.batch_norm_stats(x, eps)
    count = mean.new_full((1,), x.numel() // x.shape[1])
    gathered = _gather(torch.cat([mean, invstd, count]), processes)  # [P, 2 C + 1]
    means, invstds, counts = gathered.split([len(mean), len(mean), 1], dim=1)
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        x, means, invstds, running_mean, running_var, momentum, eps, counts[:, 0]
    )
    y = torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
    return y, mean, invstd, counts[:, 0].to(torch.int32)


def _gradients(gradient, x, weight, mean, invstd, counts):
    """Gradients by x, weight and bias.

    Those by weight and bias are of this process's batch; DistributedDataParallel adds them up.
    """
    sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
        gradient, x, mean, invstd, weight, True, True, True
    )
    sums = torch.cat([sum_dy, sum_dy_xmu])  # [2 C]
    dist.all_reduce(sums)
    grad_x = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, *sums.chunk(2), counts)
    return grad_x, grad_weight, grad_bias


def _gather(values, processes):
    """The vectors [N] of all processes, [P, N]."""
    gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # its older name
    gathered = values.new_empty(processes * len(values))
    gather(gathered, values)
    return gathered.view(-1, len(values))


OPERATIONS.impl('sync_batch_norm', _normalize, 'CompositeExplicitAutograd')
OPERATIONS.impl('sync_batch_norm', _SyncBatchNorm.apply, 'Autograd')
OPERATIONS.impl('sync_batch_norm_backward', _gradients, 'CompositeExplicitAutograd')


@torch.library.register_fake('pop::sync_batch_norm', lib=OPERATIONS)
def _(x, weight, bias, running_mean, running_var, momentum, eps, processes):
    counts = running_mean.new_empty(processes, dtype=torch.int32)
    return torch.empty_like(x), torch.empty_like(running_mean), torch.empty_like(running_mean), counts


@torch.library.register_fake('pop::sync_batch_norm_backward', lib=OPERATIONS)
def _(gradient, x, weight, mean, invstd, counts):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
