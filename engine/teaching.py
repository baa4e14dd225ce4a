"""Teaching novel classes on kept features: views go through the frozen network once, and each training uses them."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from core.errors import InputError
from dataset import Augmentation, SegmentationDataset
from dataset.own_classes import SupportSamples, support_positions
from dataset.views import DrawnViews, KeptPairs
from engine.evaluation import evaluate
from engine.features import FeatureKeeper, KeptFeatures, LabelledFeatures, join
from engine.loaders import training_loader
from engine.optim import Optimization
from engine.precision import autocast
from model import POP, Head, JointPOP
from model.kernels import predict

TURNS = 5  # at most so many trainings leave photographs out


@dataclass(frozen=True)
class TrainingSettings:
    """How novel classes are trained.

    Attributes:
        steps: number of optimisation steps.
        batch_size: pairs of a support view and a base view per step.
        learning_rate: at the start, of the backbone, as in stage 2; the head has ten times this rate.
        power: of the poly schedule (`optim.Optimization`).
        momentum, weight_decay: of SGD.
        seed: of all random draws.
    """

    steps: int
    batch_size: int = 1
    learning_rate: float = 1e-3
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 123


def novel_state(net: POP) -> dict[str, torch.Tensor]:
    """A copy of what stage 2 adds."""
    return {name: value.clone() for name, value in net.state_dict().items() if name.startswith(net.STAGE_2_PREFIXES)}


def learn(
    net: POP, support: KeptFeatures, base: KeptFeatures, settings: TrainingSettings, dtype: torch.dtype,
    title: str,
):  # fmt: skip
    """Train the novel prototypes and phi_n of a network, in place.

    Args:
        net: with novel classes; all else stays as it is.
        support, base: views of the novel classes, and as many of each base class, in the order of the classes.
        settings: of the training.
        dtype: that convolutions run in.
        title: of the progress bar.

    Raises:
        InputError: the loss is not finite, or its scale has collapsed.
    """
    net.freeze_base()
    net.train()
    head, device = Head(net), net.base_emb.device
    count = len(base.masks) // net.num_base  # of each class
    pairs = KeptPairs(
        support, base, num_base=net.num_base, per_class=count, support_ids=(), shot=count, seed=settings.seed
    )  # fmt: skip
    loader = training_loader(pairs, settings.batch_size, settings.seed, num_workers=0, device=device, fill_last=True)
    optimization = Optimization(
        net, settings.learning_rate, settings.momentum, settings.weight_decay, total_steps=settings.steps,
        power=settings.power, fp16=dtype == torch.float16,
    )  # fmt: skip
    steps = tqdm(range(settings.steps), title, leave=False, disable=None)
    for step, batch in zip(steps, _epochs(loader), strict=False):
        halves = [(support, batch['support']), (base, batch['base'])]
        maps = [kept.take(half['row']) for kept, half in halves]
        masks = torch.cat([half['mask'].to(device, non_blocking=True) for _, half in halves]).long()
        with autocast(device, dtype):
            logits = head(join(maps))
        loss = sum(net.novel_losses(logits, masks).values())
        optimization.backward(loss)
        optimization.step()
        if step % 50 == 0 or step + 1 == settings.steps:
            if not math.isfinite(loss.item()):
                raise InputError(f'the loss is {loss.item()} at step {step + 1}; lower --learning-rate')
            if optimization.scale_collapsed:
                raise InputError(f'gradients overflow float16 at step {step + 1}; lower --learning-rate, or no --fp16')


def _epochs(loader):
    """Batches of one epoch after another, without end."""
    while True:
        yield from loader
        loader.batch_sampler.epoch += 1


@torch.no_grad()
def label_rest(kept: KeptFeatures, base: POP):
    """Give the pixels with label 0, in place, what the base network says of them.

    A mask of one class says where that class is. What else the photograph shows is none of it, and may be of a base
    class; to train such pixels as background would unlearn base classes.

    Args:
        kept: views of support images; their labels are 0, 255 and those of novel classes.
        base: the network without novel classes.
    """
    scores = base.constants()
    for row in kept.rows:
        mask = kept.masks[row]
        logits = base.classify(base.finish_maps(kept.take(torch.tensor([row]))), scores)
        found = predict(logits[:, base.first_label :], tuple(mask.shape))[0].to(mask) + base.first_label
        kept.masks[row] = torch.where(mask == 0, found, mask)


def turns(samples: SupportSamples) -> list[set[str]]:
    """Ids of what each training leaves out: whole photographs, also where these show several of the classes.

    Every training keeps a photograph of each class, so some may be left out in none.
    """
    by_photograph, sizes = {}, Counter(map(samples.label, samples.ids))
    for image_id in samples.ids:
        by_photograph.setdefault(samples.photograph(image_id), []).append(image_id)
    parts = [(set(), Counter()) for _ in range(min(max(sizes.values()), TURNS))]  # ids, and images of each class
    for ids in by_photograph.values():
        shown = Counter(map(samples.label, ids))
        fitting = [part for part in parts if all(part[1][c] + shown[c] < sizes[c] for c in shown)]
        if fitting:
            left_out, counts = min(fitting, key=lambda part: max(part[1][c] for c in shown))
            left_out.update(ids)
            counts.update(shown)
    return [left_out for left_out, _ in parts if left_out]


class Teacher:
    """Trains the novel classes of a network, with all images of theirs or without some.

    Args:
        net: with novel classes, untrained.
        base: the network without them.
        earlier: what stage 2 adds, as an earlier lesson has trained it; new classes have the values of `net`. Empty:
            there was none.
        samples: the images, with labels of the network.
        base_views: as many of each base class, in the order of the classes.
        keeper: gives the features.
        size: (H, W) of the views.
        settings: of the training.
        views: of each class.
        scale_range: of the views, relative to the size that fits.
    """

    def __init__(
        self,
        net: JointPOP,
        base: JointPOP,
        samples: SupportSamples,
        base_views: KeptFeatures,
        *,
        earlier: dict[str, torch.Tensor],
        keeper: FeatureKeeper,
        size: tuple[int, int],
        settings: TrainingSettings,
        views: int,
        scale_range: tuple[float, float],
    ):
        self.net, self.base, self.samples, self.base_views = net, base, samples, base_views
        self.keeper, self.size, self.scale_range = keeper, size, scale_range
        self.settings, self.dtype, self.num_views = settings, keeper.dtype, views
        whole = SegmentationDataset(samples.ids, samples, fit_size=size, resize_mask=True)
        self.photographs = keeper.keep(whole, 'photograph', size, whole=True)
        self.untrained, self.earlier = novel_state(net), earlier
        self._load(earlier)

    @cached_property
    def views(self) -> KeptFeatures:
        """Views of the photographs to train on, whose unlabelled pixels have labels of the base network."""
        augmented = SegmentationDataset(self.samples.ids, self.samples, Augmentation(self.size, self.scale_range))
        drawn = DrawnViews(augmented, support_positions(self.samples, self.num_views), self.settings.seed)
        views = self.keeper.keep(drawn, 'support view', self.size, whole=True)
        label_rest(views, self.base)
        return views

    def _load(self, state):
        self.net.load_state_dict(self.net.state_dict() | state)

    def learn(self):
        """Train all classes on all photographs, from where an earlier lesson left them."""
        self._train(self.earlier, 'training')

    def _train(self, earlier, title, without=()):
        device = self.net.base_emb.device
        base_views = LabelledFeatures(self.base_views, device)
        self._load(self.untrained)
        self.net.start_from_supports(LabelledFeatures(_others(self.photographs, without), device), base_views)
        # with the standardisation that earlier prototypes were trained with; discriminants were just fitted to all
        self._load({key: value for key, value in earlier.items() if not key.startswith('discriminants.')})
        learn(self.net, _others(self.views, without), self.base_views, self.settings, self.dtype, title)
        self.net.calibrate(base_views)

    def segment(self, ids: Collection[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Segment some of the photographs.

        Returns:
            Confusion matrix, int64 [K, K], row = truth; and image id -> labels uint8 [H, W].
        """
        found = {}
        rows = [row for row, known in self.photographs.rows.items() if known['id'] in ids]
        confusion = evaluate(
            self.net, self.photographs.part(rows), self.net.base_emb.device, self.dtype,
            lambda image_id, prediction, truth: found.update({image_id: prediction.byte().cpu().numpy()}),
        )  # fmt: skip
        return confusion, found

    def left_out(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `segment`, of the photographs that can be left out, each by a network that was trained without it.

        One training leaves out one photograph of each class that has several, and photographs take turns (`turns`);
        with more than `TURNS` in a class, a training leaves out several of it. These trainings start untrained: an
        earlier lesson may have seen what is left out.
        """
        total, found, trained = 0, {}, novel_state(self.net)
        parts = turns(self.samples)
        for turn, ids in enumerate(parts, start=1):
            self._train({}, f'left out {turn} of {len(parts)}', without=ids)
            confusion, predictions = self.segment(ids)
            total, found = total + confusion, found | predictions
        self._load(trained)
        return total, found


def _others(kept: KeptFeatures, ids: Collection[str]) -> KeptFeatures:
    """All rows but those of images with these ids."""
    return kept.part([row for row, known in kept.rows.items() if known['id'] not in ids])
