"""Optimisation: SGD's parameter groups, the poly schedule, mixed precision and gradient clipping."""

import torch
from torch import nn

GRADIENT_CLIP = 5.0
HEAD_LR_FACTOR = 10
MIN_LOSS_SCALE = 1.0  # below it, float16 gradients overflow though the loss is not scaled up: training has failed
GIVEN = ('initial_lr', 'momentum', 'weight_decay')  # settings of a group that the command line gives


def parameter_groups(net: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """SGD groups: backbone at the learning rate, the rest at ten times it and without weight decay on biases.

    Args:
        net: parameters named backbone.* belong to the backbone; frozen ones are left out.
        learning_rate, weight_decay: of the backbone.

    Returns:
        The groups that have parameters, each with a 'name'.
    """
    groups = {
        'backbone': {'params': [], 'lr': learning_rate, 'weight_decay': weight_decay},
        'head': {'params': [], 'lr': learning_rate * HEAD_LR_FACTOR, 'weight_decay': weight_decay},
        'head_bias': {'params': [], 'lr': learning_rate * HEAD_LR_FACTOR, 'weight_decay': 0.0},
    }
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            outside = 'head_bias' if name.endswith('.bias') else 'head'
            groups['backbone' if name.startswith('backbone.') else outside]['params'].append(parameter)
    return [{'name': name, **group} for name, group in groups.items() if group['params']]


class Optimization:
    """SGD with momentum, poly decay per step, gradient clipping and, on CUDA with --fp16, loss scaling.

    Args:
        net: trained where requires_grad.
        learning_rate, momentum, weight_decay: see `parameter_groups`.
        total_steps: steps of the whole run; the learning rate is 0 after them.
        first_step: the step to start at.
        power: of the poly schedule, (1 - step / total_steps)^power; 0 keeps the learning rate constant.
        fp16: scale the loss on CUDA, whose float16 gradients underflow otherwise.
    """

    def __init__(
        self,
        net: nn.Module,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        total_steps: int,
        first_step: int = 0,
        power: float = 0.9,
        fp16: bool = False,
    ):
        groups = parameter_groups(net, learning_rate, weight_decay)
        self.parameters = [parameter for group in groups for parameter in group['params']]
        self.optimizer = torch.optim.SGD(groups, momentum=momentum, fused=True)
        if momentum:
            # Fused SGD would allocate momentum without initialising it and rely on the first step to write it, which
            # is skipped where the scaled loss overflows. Zero momentum gives the same first step.
            for parameter in self.parameters:
                self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(1 - (first_step + step) / total_steps, 0) ** power
        )
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler('cuda', enabled=fp16 and self.device.type == 'cuda')

    def backward(self, loss: torch.Tensor):
        """Add the gradients of a scalar loss to those of the next step."""
        self.scaler.scale(loss).backward()

    def step(self) -> torch.Tensor:
        """Take one step; returns the gradient norm before clipping, a scalar."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)  # now: the next forward pass can use their memory
        return grad_norm

    @property
    def scales(self) -> bool:
        """Whether losses are scaled."""
        return self.scaler.is_enabled()

    @property
    def loss_scale(self) -> float:
        """The factor of the losses; reading it waits for the GPU."""
        return self.scaler.get_scale()

    @property
    def scale_collapsed(self) -> bool:
        """Whether steps are skipped without end, as gradients overflow float16 in each; may wait for the GPU."""
        return self.scales and self.loss_scale < MIN_LOSS_SCALE

    def state_dict(self) -> dict:
        """Momentum, schedule position and loss scale."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict):
        """Restore a `state_dict`; learning rate, momentum and weight decay stay those that this run was given."""
        given = [{key: group[key] for key in GIVEN} for group in self.optimizer.param_groups]
        for name, part in self._parts.items():
            if state[name]:  # a run without loss scaling has none of its state
                part.load_state_dict(state[name])
        self.schedule.base_lrs = [group['initial_lr'] for group in given]
        for group, own, factor in zip(self.optimizer.param_groups, given, self.schedule.lr_lambdas, strict=True):
            group |= own | {'lr': own['initial_lr'] * factor(self.schedule.last_epoch)}

    @property
    def _parts(self):
        return {'optimizer': self.optimizer, 'schedule': self.schedule, 'scaler': self.scaler}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Group name -> current learning rate."""
        return {group['name']: group['lr'] for group in self.optimizer.param_groups}
