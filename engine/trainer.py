"""Training, as both stages do it: steps, validation, checkpoints. `stage.Stage` is what differs between the two."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from core import IGNORE_INDEX, signals
from core.errors import InputError
from core.ranks import is_main, rank, world_size
from engine.distributed import broadcast, broadcast_buffers, mean_over_processes, sum_over_processes
from engine.measuring import Speed, peak_memory
from engine.metrics import iou_per_class, summarize
from engine.optim import Optimization
from engine.run import Run
from engine.stage import Plan, Stage

T = TypeVar('T')
SECONDS_BETWEEN_SAVES = 10  # at least, between `last` of two epochs


@dataclass
class Progress:
    """Where a run is; stored in its checkpoints.

    Attributes:
        epoch, step: epochs done, and steps done of the current epoch. All steps done: validation is due.
        best, best_epoch: validation metrics of the best checkpoint, and the epochs that it had done.
        last: metrics of the latest weights that were validated.
        finished: nothing is left to do.
    """

    epoch: int
    step: int = 0
    best: dict | None = None
    best_epoch: int = 0
    last: dict = field(default_factory=dict)
    finished: bool = False


class Trainer:
    """Trains a stage step by step, validates it, and saves what is needed to resume (`resume`).

    Args:
        stage: what is trained.
        loader: from `loaders.training_loader`; None: nothing is trained, so that an epoch has no steps.
        optimization: of the stage's network; None where nothing is trained.
        run: gets checkpoints and logs; its saved state, if there is one, is restored here.
        plan: how long, and when to validate, save and log.
    """

    def __init__(
        self, stage: Stage, loader: DataLoader | None, optimization: Optimization | None, run: Run, plan: Plan
    ):
        self.stage, self.net, self.loader = stage, stage.net, loader
        self.optimization, self.run, self.plan = optimization, run, plan
        self.logger = run.logger
        self.steps_per_epoch = 0 if loader is None else loader.batch_sampler.steps
        self.progress = Progress(plan.start_epoch, best_epoch=plan.start_epoch)
        self.saved_at, self.skipped = time.monotonic(), set()
        self.position = {} if stage.seed is None else {'seed': stage.seed}
        self.prefix = '' if stage.seed is None else f'seed {stage.seed} '
        state = run.folder.state(stage.seed)
        if state:
            self.load_state(state)

    def load_state(self, state: dict):
        """Restore what `save` stored."""
        self.net.load_state_dict(state['model'])
        training = state['training']
        if self.optimization:
            self.optimization.load_state_dict(training['optimization'])
        self.progress = Progress(**training['progress'])
        where = f'resumed at epoch {self.progress.epoch + 1}, step {self.progress.step + 1}'
        done = 'finished earlier; train longer: --resume FILE with more epochs; start over: --resume off --overwrite'
        self.logger.info(self.prefix + (done if self.progress.finished else where))

    def save(self, name: str = 'last'):
        """Write a checkpoint; training can resume from all but `best`."""
        progress, training = self.progress, None
        if name != 'best':
            training = {
                'optimization': self.optimization.state_dict() if self.optimization else None,
                'progress': asdict(progress),
                'step': progress.epoch * self.steps_per_epoch + progress.step,
            }
        self.run.save(name, self.stage, progress.epoch, progress.last, training)
        if name == 'last':
            self.saved_at = time.monotonic()

    def fit(self) -> dict[str, dict]:
        """Train until the plan's last epoch.

        Returns:
            Validation metrics of 'best' and of 'last'; none where nothing was validated.

        Raises:
            InputError: the loss is not finite; names the batch's images.
            Stopped: SIGTERM or SIGINT arrived; the state is saved.
        """
        progress, plan = self.progress, self.plan
        while not progress.finished and progress.epoch < plan.num_epoch:
            self.train_epoch()
            is_last = progress.epoch + 1 == plan.num_epoch
            validated = self.stage.val_batches is not None and ((progress.epoch + 1) % plan.val_every == 0 or is_last)
            if validated or is_last or plan.keeps(progress.epoch + 1):
                self.interruptible(self.stage.calibrate)
            metrics = self.validation() if validated else {}
            progress.epoch, progress.step, progress.last = progress.epoch + 1, 0, metrics
            if metrics:
                self.update_best(metrics)
            self.end_epoch(stops_early=bool(metrics) and self.is_out_of_patience())
        if self.skipped:
            self.logger.info(f'{self.prefix}{len(self.skipped)} training images were skipped')
        if self.stage.val_batches is None or not progress.best:
            last = self.run.folder.path('last', self.stage.seed)
            why = 'no validation list' if self.stage.val_batches is None else 'these epochs were not validated'
            self.logger.info(f'{self.prefix}{why}, so only the last checkpoint is kept: {last}')
            return {}
        best = self.run.folder.path('best', self.stage.seed)
        self.logger.info(f'{self.prefix}best checkpoint: {best}, epoch {progress.best_epoch}')
        return {'best': progress.best, 'last': progress.last}

    def is_out_of_patience(self) -> bool:
        """Whether the latest best is more than the stage's patience ago."""
        idle = self.progress.epoch - self.progress.best_epoch
        stops = self.stage.patience is not None and idle > self.stage.patience
        if stops:
            self.logger.info(f'{self.prefix}no better result for {idle} epochs, stopping early')
        return stops

    def end_epoch(self, stops_early: bool):
        """Save, and stop if a signal asks for it. `last` is written last: a run killed before it repeats this.

        Short epochs, such as those on kept features, are not worth a checkpoint each.
        """
        progress, plan = self.progress, self.plan
        progress.finished = broadcast(stops_early or progress.epoch == plan.num_epoch)
        if plan.keeps(progress.epoch):
            self.save(f'epoch_{progress.epoch}')
        if progress.finished:
            final = {f'best_{name}': value for name, value in (progress.best or {}).items()}
            final |= {f'last_{name}': value for name, value in progress.last.items()}
            self.logger.hyperparameters(self.run.arguments, final, **self.position)
        received = sum_over_processes(*signals.received())
        new_best = progress.best_epoch == progress.epoch  # `last` must not be older, or a resumed run may miss it
        if progress.finished or any(received) or new_best or self.seconds_since_save() >= SECONDS_BETWEEN_SAVES:
            self.save()
        signals.raise_if_received(received)

    def train_epoch(self):
        """Take the steps that are left of the current epoch."""
        plan, progress = self.plan, self.progress
        self.net.train()
        if progress.step == self.steps_per_epoch:
            return
        sampler = self.loader.batch_sampler
        sampler.epoch, sampler.first_step = progress.epoch, progress.step
        # reading a loss waits for the GPU, so there it is read when it is printed
        check_every = 1 if self.optimization.device.type == 'cpu' else plan.print_frequency
        unchecked, speed = [], Speed(progress.step)
        hidden = None if is_main() else True  # None: hidden unless there is a terminal
        bar = tqdm(None, self.title, self.steps_per_epoch, initial=progress.step, leave=False, disable=hidden)
        batches = iter(self.loader)
        while progress.step < self.steps_per_epoch:
            with speed.waiting():
                micro_batches = [next(batches) for _ in range(sampler.micro_batches)]
            rates = self.optimization.learning_rates
            values, received = self.step(micro_batches)
            progress.step += 1
            bar.update()
            self.note_skipped(micro_batches)
            image_ids = [name for batch in micro_batches for name in _all_of(batch, 'id')]
            unchecked.append((progress.step, values, image_ids))
            due = any(received) or self.is_save_due()
            if due or progress.step % check_every == 0 or progress.step == self.steps_per_epoch:
                self.check_finite(unchecked)
                unchecked = []
            if progress.step % plan.print_frequency == 0 or progress.step == self.steps_per_epoch:
                self.log_step(bar, values, rates, speed, len(image_ids))
            if due:
                self.save()
            signals.raise_if_received(received)
        bar.close()

    @property
    def title(self) -> str:
        """Title of the current epoch in log and progress bar."""
        return f'{self.prefix}epoch {self.progress.epoch + 1}/{self.plan.num_epoch}'

    def step(self, micro_batches: list[dict]) -> tuple[dict, list[int]]:
        """Take one optimisation step, whose gradients are the sum of its micro-batches'.

        The loss is normalised by the counted pixels of all processes and micro-batches, so that a step does not depend
        on how its batch is divided. DistributedDataParallel averages gradients, hence the factor `world_size()`.

        Returns:
            Loss terms and 'grad_norm', scalar tensors; how many processes each signal has reached.
        """
        pixels, *received = sum_over_processes(sum(map(_counted_pixels, micro_batches)), *signals.received())
        pixel_weight = world_size() / max(pixels, 1)
        values = {}
        for i, batch in enumerate(micro_batches):
            # processes exchange gradients once a step, in its last backward pass
            self.seed_draws(i)
            exchanges = i + 1 == len(micro_batches) or not hasattr(self.stage.model, 'no_sync')
            with contextlib.nullcontext() if exchanges else self.stage.model.no_sync():
                losses = self.stage.losses(batch, pixel_weight=pixel_weight, micro_batches=len(micro_batches))
                self.optimization.backward(sum(losses.values()))
            values = {name: values.get(name, 0) + value.detach() for name, value in losses.items()}
        values['grad_norm'] = self.optimization.step()
        return values, received

    def seed_draws(self, micro_batch: int):
        """Make what losses and dropout draw a function of seed, epoch, step, micro-batch and process."""
        place = (self.loader.batch_sampler.seed, self.progress.epoch, self.progress.step, micro_batch, rank())
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def log_step(self, bar: tqdm, values: dict, rates: dict, speed: Speed, images: int):
        """Log the step just done; `values` and `rates` are its losses and learning rates, `images` this process's."""
        progress, device = self.progress, self.optimization.device
        means = mean_over_processes(values)
        steps_per_second, waiting = speed.measure(progress.step)
        images_per_second = steps_per_second * images * world_size()
        left = (self.steps_per_epoch * (self.plan.num_epoch - progress.epoch) - progress.step) / steps_per_second
        memory = peak_memory(device) / 1e9
        losses = ' '.join(f'{name} {value:.4f}' for name, value in means.items() if name != 'grad_norm')
        shown_rates = ' '.join(f'{name} {rate:.2e}' for name, rate in rates.items() if name != 'head_bias')
        scale = {'loss_scale': self.optimization.loss_scale} if self.optimization.scales else {}
        shown_scale = ''.join(f' | loss scale {value:g}' for value in scale.values())
        line = (
            f'{losses} | lr {shown_rates} | grad norm {means["grad_norm"]:.2f}{shown_scale} | '
            f'{images_per_second:.1f} images/s, '
            f'{waiting:.0%} waiting for data | {memory:.1f} GB | {timedelta(seconds=round(left))} left'
        )
        bar.set_postfix_str(f'{losses}, {timedelta(seconds=round(left))} left')
        self.logger.info(f'{self.title} step {progress.step}/{self.steps_per_epoch} | {line}', terminal=bar.disable)
        self.logger.record(
            'train', progress.epoch * self.steps_per_epoch + progress.step,
            means | scale | {f'lr_{name}': rate for name, rate in rates.items()},
            {'images_per_second': images_per_second, 'waiting_for_data': waiting, 'memory_gb': memory},
            epoch=progress.epoch + 1, **self.position,
        )  # fmt: skip

    def validation(self) -> dict:
        """Validate the network and log its metrics and pictures; returns the metrics."""
        epoch, began = self.progress.epoch + 1, time.perf_counter()
        step = epoch * self.steps_per_epoch
        broadcast_buffers(self.net)
        confusion, images = self.interruptible(self.stage.validate)
        means, seconds = summarize(confusion, self.net.num_base), {'seconds': time.perf_counter() - began}
        rests_on = {'images': images, 'listed_images': max(self.stage.listed, images)}
        iou = dict(zip(self.stage.class_names, iou_per_class(confusion).tolist(), strict=True))
        self.logger.record('val', step, means, seconds, iou, epoch=epoch, **rests_on, **self.position)
        if is_main():
            for name, picture in self.stage.panel.pictures(self.net).items():
                self.logger.picture(name, picture, step, **self.position)
        return means | rests_on

    def interruptible(self, evaluation: Callable[[], T]) -> T:
        """Call a function of the stage that a signal stops between two batches; the weights are those of the epoch."""
        try:
            return evaluation()
        except signals.Stopped:
            self.save()
            raise

    def update_best(self, metrics: dict):
        """Save the weights as `best` where their metrics are the best so far."""
        progress = self.progress
        if broadcast(self.stage.improves(metrics, progress.best)):
            progress.best, progress.best_epoch = metrics, progress.epoch
            self.save('best')
        shown = [f'{name} {metrics[name]:.2f} %' for name in ('base', 'novel', 'total') if metrics[name] >= 0]
        images, listed = metrics['images'], metrics['listed_images']
        images = f' on {images} of {listed} images' if images < listed else ''
        best_at = f'best at epoch {progress.best_epoch}'
        self.logger.info(f'{self.prefix}epoch {progress.epoch}: mIoU {", ".join(shown)}{images}; {best_at}')

    def is_save_due(self) -> bool:
        """Whether the plan asks for a checkpoint now; the main process, which writes it, checks the elapsed time."""
        plan, done = self.plan, self.progress.epoch * self.steps_per_epoch + self.progress.step
        by_steps = plan.save_every_steps and done % plan.save_every_steps == 0
        if by_steps or not plan.save_every_minutes or not is_main():
            return bool(by_steps)
        return self.seconds_since_save() >= 60 * plan.save_every_minutes

    def seconds_since_save(self) -> float:
        """Since `last` was written."""
        return time.monotonic() - self.saved_at

    def note_skipped(self, micro_batches: list[dict]):
        """Log each image that could not be read (--skip-bad-images) once."""
        reasons = {reason for batch in micro_batches for reason in _all_of(batch, 'skipped') if reason}
        for reason in reasons - self.skipped:
            self.skipped.add(reason)
            self.logger.info(f'{self.prefix}skipped: {reason}')

    def check_finite(self, steps: list[tuple]):
        """InputError at the first of (step, values, image ids) whose loss or gradient is not finite.

        Also where the loss scale has collapsed, as steps are skipped without end then.
        """
        # loss scaling overflows gradients on purpose, and skips these steps
        sums = [
            sum(value for name, value in values.items() if name != 'grad_norm' or not self.optimization.scales)
            for _, values, _ in steps
        ]
        if self.optimization.scale_collapsed:
            raise InputError(
                f'the loss scale fell to {self.optimization.loss_scale:g} at epoch {self.progress.epoch + 1}, step '
                f'{steps[-1][0]}: gradients overflow float16 in every step (images: {", ".join(steps[-1][2])}). '
                'Lower --learning-rate, or train without --fp16.'
            )
        finite = torch.stack(sums).isfinite().tolist()
        if not all(finite):
            step, values, image_ids = steps[finite.index(False)]
            shown = ', '.join(f'{name} {value.item():.4g}' for name, value in values.items())
            raise InputError(
                f'loss is not finite at epoch {self.progress.epoch + 1}, step {step} ({shown}); images: '
                f'{", ".join(image_ids)}. Lower --learning-rate, or look at these images and masks.'
            )


def _counted_pixels(batch: dict) -> int:
    """How many pixels of a batch of either stage the loss counts."""
    return sum(int((mask != IGNORE_INDEX).sum()) for mask in _all_of(batch, 'mask'))


def _all_of(batch: dict, key: str) -> list:
    """The items under a key of a batch of stage 1, or of both halves of one of stage 2."""
    halves = [batch] if key in batch else batch.values()
    return [item for half in halves for item in half[key]]
