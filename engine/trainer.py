"""Training, as both stages do it: steps, validation, checkpoints, and going on after an interruption."""

import contextlib
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
from tqdm import tqdm

from core import IGNORE_INDEX, signals
from core.errors import InputError
from engine.checkpoint import save_checkpoint
from engine.distributed import (
    broadcast,
    broadcast_buffers,
    is_main,
    mean_over_processes,
    sum_over_processes,
    world_size,
)
from engine.metrics import iou_per_class, summarize
from engine.optim import Optimization
from report.tensorboard import similarity_picture


@dataclass
class Progress:
    """Where a run is; stored in its checkpoints.

    Attributes:
        epoch, step: epochs done, and steps done of the epoch at hand. All steps done: validation is due.
        best, best_epoch: validation results of the best checkpoint, and the epochs that it had done.
        last: those of the latest weights that were validated.
        finished: nothing is left to do.
    """

    epoch: int
    step: int = 0
    best: dict | None = None
    best_epoch: int = 0
    last: dict = field(default_factory=dict)
    finished: bool = False


class Trainer:
    """Trains a network step by step, validates it, and keeps what is needed to go on after an interruption.

    Args:
        losses (callable): (batch, share) -> dict of named loss terms, whose sum is minimised; `share` is handed on to
            `losses.pop_losses`.
        validate (callable): () -> confusion matrix on the validation images.
        panel (ValidationPanel): has seen the same predictions; goes to TensorBoard.
        net (POP): the network, unwrapped; what requires gradients is trained.
        parallel_net (nn.Module): the same under DistributedDataParallel where there are several processes.
        loader (DataLoader): from `training_loader`.
        args (Namespace): the training flags.
        config (dict): stored in the checkpoints (`checkpoint.network_config`).
        improves (callable): (metrics, best metrics or None) -> whether these are the new best.
        snapshots (RunFolder): the run's folder.
        logger (RunLogger): of this run.
        seed (int, optional): of stage 2; part of the file names.
        patience (int, optional): stop after more than this many epochs without a new best, as the released code does.
    """

    def __init__(
        self, losses, validate, panel, net, parallel_net, loader, args, config, improves, snapshots, logger, seed=None,
        patience=None,
    ):  # fmt: skip
        self.losses, self.validate, self.panel = losses, validate, panel
        self.net, self.parallel_net = net, parallel_net
        self.loader, self.args, self.config, self.improves = loader, args, config, improves
        self.snapshots, self.logger, self.seed, self.patience = snapshots, logger, seed, patience
        self.steps = loader.batch_sampler.steps
        self.optimization = Optimization(
            net, args.learning_rate, args.momentum, args.weight_decay, args.num_epoch * self.steps,
            first_step=args.start_epoch * self.steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
        )  # fmt: skip
        self.progress = Progress(args.start_epoch, best_epoch=args.start_epoch)
        self.saved_at, self.skipped = time.monotonic(), set()
        self.position = {} if seed is None else {'seed': seed}
        self.who = '' if seed is None else f'seed {seed} '
        state = snapshots.state(seed)
        if state:
            self.resume(state)

    def resume(self, state):
        """Go on from what `save` stored."""
        self.net.load_state_dict(state['model'])
        training = state['training']
        self.optimization.load_state_dict(training['optimization'])
        self.progress = Progress(**training['progress'])
        torch.set_rng_state(training['rng'])
        where = f'resumed at epoch {self.progress.epoch + 1}, step {self.progress.step + 1}'
        done = 'finished earlier; to train on: --resume FILE with more epochs, to start anew: --resume off --overwrite'
        self.logger.info(self.who + (done if self.progress.finished else where))

    def save(self, name='last'):
        """Write a checkpoint; all but `best` can be gone on from."""
        progress = self.progress
        training = (
            None
            if name == 'best'
            else {
                'arguments': self.snapshots.arguments[self.seed],
                'optimization': self.optimization.state_dict(),
                'progress': asdict(progress),
                'rng': torch.get_rng_state(),
                'step': progress.epoch * self.steps + progress.step,
                'records': self.logger.secure_records(self.seed),
            }
        )
        save_checkpoint(
            self.snapshots.path(name, self.seed), self.net,
            self.config | {'base_size': list(self.args.base_size)}, progress.epoch, progress.last,
            training,
            self.snapshots.path('previous', self.seed) if name == 'last' else None,
        )  # fmt: skip
        if name == 'last':
            self.saved_at = time.monotonic()

    def fit(self):
        """Train to --num-epoch.

        Returns:
            dict: validation results of 'best' and of 'last'.

        Raises:
            InputError: the loss is not finite; names the batch's images.
            Stopped: SIGTERM or SIGINT arrived; the state is saved.
        """
        progress, args = self.progress, self.args
        while not progress.finished and progress.epoch < args.num_epoch:
            self.train_epoch()
            validated = (progress.epoch + 1) % args.val_every == 0 or progress.epoch + 1 == args.num_epoch
            metrics = self.validation() if validated else {}
            progress.epoch, progress.step, progress.last = progress.epoch + 1, 0, metrics
            if metrics:
                self.compare(metrics)
            idle = progress.epoch - progress.best_epoch
            stops_early = bool(metrics and self.patience is not None and idle > self.patience)
            progress.finished = broadcast(stops_early or progress.epoch == args.num_epoch)
            if stops_early:
                self.logger.info(f'{self.who}no better result for {idle} epochs, stopping early')
            # `last` comes last: a run that is interrupted before it does all of this again
            if args.save_pred_every and progress.epoch % args.save_pred_every == 0:
                self.save(f'epoch_{progress.epoch}')
            if progress.finished:
                final = {f'best_{name}': value for name, value in progress.best.items()}
                final |= {f'last_{name}': value for name, value in progress.last.items()}
                self.logger.hyperparameters(vars(args), final, **self.position)
            self.save()
            asked = sum_over_processes(*signals.flags())
            if any(asked):
                raise signals.stop(asked)
        if self.skipped:
            self.logger.info(f'{self.who}{len(self.skipped)} training images were skipped')
        best = self.snapshots.path('best', self.seed)
        self.logger.info(f'{self.who}best checkpoint: {best}, epoch {progress.best_epoch}')
        return {'best': progress.best, 'last': progress.last}

    def train_epoch(self):
        """The steps that are left of the epoch at hand."""
        args, progress, sampler = self.args, self.progress, self.loader.batch_sampler
        self.net.train()
        sampler.epoch, sampler.first_step = progress.epoch, progress.step
        if progress.step == self.steps:
            return
        # reading a loss makes a GPU's queue run dry, so there it is looked at when it is printed
        look_every = 1 if self.optimization.device.type == 'cpu' else args.print_frequency
        unseen, first, began, waited = [], progress.step, time.perf_counter(), 0.0
        bar = tqdm(None, self.title, self.steps, initial=first, leave=False, disable=None if is_main() else True)
        batches = iter(self.loader)
        while progress.step < self.steps:
            asked_at = time.perf_counter()
            parts = [next(batches) for _ in range(sampler.parts)]
            waited += time.perf_counter() - asked_at
            pixels, *asked = sum_over_processes(sum(map(_counted_pixels, parts)), *signals.flags())
            rates = self.optimization.learning_rates
            values = self.backward(parts, {'pixels': pixels, 'parts': len(parts)})
            grad_norm = self.optimization.step()
            progress.step += 1
            values['grad_norm'] = grad_norm
            bar.update()
            self.note_skipped(parts)
            ids = [name for part in parts for name in _all_of(part, 'id')]
            unseen.append((progress.step, values, ids))
            due = any(asked) or self.save_is_due()
            if due or progress.step % look_every == 0 or progress.step == self.steps:
                self.check_finite(unseen)
                unseen = []
            if progress.step % args.print_frequency == 0 or progress.step == self.steps:
                elapsed = time.perf_counter() - began
                self.report(bar, values, rates, (progress.step - first) / elapsed, len(ids), waited / elapsed)
            if due:
                self.save()
            if any(asked):
                raise signals.stop(asked)
        bar.close()

    @property
    def title(self):
        """Of the epoch at hand."""
        return f'{self.who}epoch {self.progress.epoch + 1}/{self.args.num_epoch}'

    def backward(self, parts, share):
        """Add up the gradients of a step's parts; returns the loss terms of the step, as tensors."""
        values = {}
        for i, part in enumerate(parts):
            # processes exchange gradients once a step
            last = i + 1 == len(parts) or not hasattr(self.parallel_net, 'no_sync')
            with contextlib.nullcontext() if last else self.parallel_net.no_sync():
                losses = self.losses(part, share)
                self.optimization.backward(sum(losses.values()))
            values = {name: values.get(name, 0) + value.detach() for name, value in losses.items()}
        return values

    def report(self, bar, values, rates, steps_per_second, images, waiting):
        """A line in the log and a record of the step just done, which took so many images in this process."""
        progress, args = self.progress, self.args
        means = mean_over_processes(values)
        speed = steps_per_second * images * world_size()
        left = (self.steps * (args.num_epoch - progress.epoch) - progress.step) / steps_per_second
        memory = _peak_memory(self.optimization.device)
        losses = ' '.join(f'{name} {value:.4f}' for name, value in means.items() if name != 'grad_norm')
        shown_rates = ' '.join(f'{name} {rate:.2e}' for name, rate in rates.items() if name != 'head_bias')
        line = (
            f'{losses} | lr {shown_rates} | grad norm {means["grad_norm"]:.2f} | {speed:.1f} images/s, '
            f'{waiting:.0%} waiting for data | {memory / 1e9:.1f} GB | {timedelta(seconds=round(left))} left'
        )
        bar.set_postfix_str(f'{losses}, {timedelta(seconds=round(left))} left')
        self.logger.info(f'{self.title} step {progress.step}/{self.steps} | {line}', terminal=bar.disable)
        self.logger.record(
            'train', progress.epoch * self.steps + progress.step,
            means | {f'lr_{name}': rate for name, rate in rates.items()},
            {'images_per_second': speed, 'waiting_for_data': waiting, 'memory_gb': memory / 1e9},
            epoch=progress.epoch + 1, **self.position,
        )  # fmt: skip

    def validation(self):
        """Validate the network, and show how it does; returns its metrics."""
        epoch, began = self.progress.epoch + 1, time.perf_counter()
        step = epoch * self.steps
        broadcast_buffers(self.net)
        try:
            confusion = self.validate()
        except signals.Stopped:  # between two images; the weights are those of the end of the epoch
            self.save()
            raise
        metrics, seconds = summarize(confusion, self.net.num_base), {'seconds': time.perf_counter() - began}
        iou = dict(zip(self.panel.legend.names, iou_per_class(confusion).tolist(), strict=True))
        self.logger.record('val', step, metrics, seconds, iou, epoch=epoch, **self.position)
        if is_main():
            self.logger.picture('prototypes', similarity_picture(self.net.prototypes()), step, **self.position)
            if (picture := self.panel.draw()) is not None:
                self.logger.picture('predictions', picture, step, **self.position)
        return metrics

    def compare(self, metrics):
        """Keep the weights where their metrics are the best so far."""
        progress = self.progress
        if broadcast(self.improves(metrics, progress.best)):
            progress.best, progress.best_epoch = metrics, progress.epoch
            self.save('best')
        shown = [f'{name} {metrics[name]:.2f} %' for name in ('base', 'novel', 'total') if metrics[name] >= 0]
        best_at = f'best at epoch {progress.best_epoch}'
        self.logger.info(f'{self.who}epoch {progress.epoch}: mIoU {", ".join(shown)}; {best_at}')

    def save_is_due(self):
        """Whether --save-every-steps or --save-every-minutes asks for a checkpoint now; the main process decides."""
        args, done = self.args, self.progress.epoch * self.steps + self.progress.step
        by_steps = args.save_every_steps and done % args.save_every_steps == 0
        if by_steps or not args.save_every_minutes or not is_main():
            return bool(by_steps)
        return time.monotonic() - self.saved_at >= 60 * args.save_every_minutes

    def note_skipped(self, parts):
        """Tell of images that could not be read (--skip-bad-images), each once."""
        for reason in {reason for part in parts for reason in _all_of(part, 'skipped') if reason} - self.skipped:
            self.skipped.add(reason)
            self.logger.info(f'{self.who}skipped: {reason}')

    def check_finite(self, steps):
        """InputError at the first of (step, values, image ids) whose loss or gradient is not finite."""
        # loss scaling overflows gradients on purpose, and skips these steps
        looked_at = [
            sum(value for name, value in values.items() if name != 'grad_norm' or not self.optimization.scales)
            for _, values, _ in steps
        ]
        finite = torch.stack(looked_at).isfinite().tolist()
        if not all(finite):
            step, values, ids = steps[finite.index(False)]
            shown = ', '.join(f'{name} {value.item():.4g}' for name, value in values.items())
            raise InputError(
                f'loss is not finite at epoch {self.progress.epoch + 1}, step {step} ({shown}); images: '
                f'{", ".join(ids)}. Lower --learning-rate, or look at these images and masks.'
            )


def _peak_memory(device):
    """Most bytes so far: of the GPU's memory, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _counted_pixels(batch):
    """How many pixels of a batch of either stage the loss looks at."""
    return sum(int((mask != IGNORE_INDEX).sum()) for mask in _all_of(batch, 'mask'))


def _all_of(batch, key):
    """The items under a key of a batch of stage 1, or of both halves of one of stage 2."""
    halves = [batch] if key in batch else batch.values()
    return [item for half in halves for item in half[key]]
