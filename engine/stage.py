"""What differs between runs of the two stages (`Stage`), and how long they train (`Plan`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from core.ranks import is_main
from engine.evaluation import Counted, evaluate
from model import Network


@dataclass(frozen=True)
class Plan:
    """How long a run trains, and when it validates, saves and logs. The names are those of the flags.

    Attributes:
        num_epoch: train until so many epochs are done.
        start_epoch: epochs that count as done before the run.
        val_every: epochs between validations; the last epoch is always validated.
        save_pred_every: epochs between `epoch_N.pth`; 0: never.
        save_every_steps: steps between saves of `last.pth` within an epoch; 0: none.
        save_every_minutes: the same by the clock.
        print_frequency: steps between log lines.
    """

    num_epoch: int
    start_epoch: int = 0
    val_every: int = 1
    save_pred_every: int = 0
    save_every_steps: int = 0
    save_every_minutes: float = 0
    print_frequency: int = 50

    def keeps(self, epoch: int) -> bool:
        """Whether `epoch_N.pth` is written when so many epochs are done."""
        return self.save_pred_every > 0 and epoch % self.save_pred_every == 0


class Panel(Protocol):
    """Shows what a network does: takes its validation predictions, gives pictures for TensorBoard."""

    def __call__(self, image_id: str, prediction: torch.Tensor, truth: torch.Tensor): ...

    def pictures(self, net: Network) -> dict[str, np.ndarray]: ...


@dataclass(kw_only=True)
class Stage(ABC):
    """What a stage trains, minimises and is judged by. train_base.py and ft_pop.py each define theirs.

    Attributes:
        net: the network that is saved; what requires gradients is trained.
        model: what `losses` calls: `net` or its head, under DistributedDataParallel where there are several processes.
        val_batches: validation images or their features (`evaluation.evaluate`); None: there are none.
        device, dtype: where and in which precision the network runs.
        panel: is called with each validation prediction, where there are any.
        class_names: of the logits.
        config: stored in the checkpoints (`from_flags.network_config`).
        seed: of stage 2; part of the file names.
        listed: number of images in the validation list, of which --val-limit takes fewer.
        patience: stop after more than so many epochs without a new best, as the released code does; None: never.
    """

    net: Network
    model: nn.Module
    val_batches: Iterable[dict] | None
    device: torch.device
    dtype: torch.dtype
    panel: Panel | None
    class_names: tuple[str, ...]
    config: dict
    seed: int | None = None
    listed: int = 0
    patience: int | None = None

    @abstractmethod
    def losses(self, batch: dict, pixel_weight: float, micro_batches: int) -> dict[str, torch.Tensor]:
        """Named loss terms of a micro-batch; their sum is minimised.

        Args:
            batch: from the training loader.
            pixel_weight, micro_batches: as in `losses.pop_losses`.
        """

    @staticmethod
    @abstractmethod
    def improves(metrics: dict, best: dict | None) -> bool:
        """Whether validation metrics (`metrics.summarize`) are better than the best so far."""

    def calibrate(self) -> None:  # noqa: B027
        """Before a validation and at the end: fit what only evaluation uses."""

    def validate(self) -> tuple[np.ndarray, int]:
        """Confusion matrix on the validation images, int64 [K, K], row = truth; and how many images these were."""
        counted = Counted(self.panel if is_main() else None)
        confusion = evaluate(self.net, self.val_batches, self.device, self.dtype, counted)
        return confusion, counted.total()
