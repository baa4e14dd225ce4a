"""What both stages and the test share: loaders, one training epoch, one evaluation."""

import time
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.checkpoint import save_checkpoint
from utils.distributed import all_sum, is_main, rank, share_buffers, world_size
from utils.errors import InputError
from utils.metrics import confusion_matrix, summarize
from utils.optim import Optimization
from utils.upsampling import needed, predict


class TrainingBatches:
    """Batch sampler of one process: (epoch, index) pairs, shuffled by (seed, epoch).

    The global order does not depend on the number of processes. A last incomplete batch is dropped, or filled up from
    the start of the order.

    Args:
        length (int): of the data set.
        batch_size (int): global.
        seed (int): of the order.
        fill_last (bool): fill the last batch rather than drop it.
    """

    def __init__(self, length, batch_size, seed, fill_last=False):
        if length < batch_size:
            raise InputError(f'{length} training samples do not fill one batch of {batch_size}; lower --batch-size')
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps = -(-length // batch_size) if fill_last else length // batch_size
        self.epoch = 0

    def __len__(self):
        return self.steps

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        share = self.batch_size // world_size()
        for i in range(self.steps):
            start = i * self.batch_size + rank() * share
            yield [(self.epoch, order[k % self.length]) for k in range(start, start + share)]


def training_loader(dataset, batch_size, seed, num_workers, device, fill_last=False):
    """Loader of training views; set `loader.batch_sampler.epoch` before each epoch."""
    return DataLoader(
        dataset,
        batch_sampler=TrainingBatches(len(dataset), batch_size, seed, fill_last),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
    )


def evaluation_loader(dataset, batch_size, num_workers, device):
    """Loader of this process's share of the evaluation images: no padding, no repeats."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank(), len(dataset), world_size()),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
        collate_fn=_collate_evaluation,
    )


def _collate_evaluation(items):
    """Stack the images; masks may differ in size and stay a list."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch['image'] = torch.stack(batch['image'])
    batch['mask'] = [torch.as_tensor(mask) for mask in batch['mask']]
    return batch


def precision(device, fp16):
    """The type that convolutions run in: with mixed precision float16 on CUDA, bfloat16 on the CPU."""
    if not fp16:
        return torch.float32
    return torch.float16 if device.type == 'cuda' else torch.bfloat16


def autocast(device, fp16):
    """Mixed precision where it is asked for."""
    return torch.autocast(device.type, precision(device, fp16), enabled=fp16)


def compile_features(net):
    """Compile backbone and decoder of a POP network in place (torch.compile); its keys stay as they are."""
    net.backbone.compile()
    net.decoder.compile()


def to_device(images, device):
    """Move images [B, 3, H, W] to the device, channels last."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def train_epoch(step, loader, optimization, logger, epoch, num_epoch, print_frequency, **position):
    """Train for one epoch.

    Args:
        step (callable): batch -> dict of named loss terms; their sum is minimised.
        loader (DataLoader): from `training_loader`.
        optimization (Optimization): takes the steps.
        logger (RunLogger): gets a line and a record every `print_frequency` steps.
        epoch, num_epoch (int): zero-based epoch and how many there are.
        position: further fields of the records.

    Raises:
        InputError: the loss is not finite; names the batch's images.
    """
    loader.batch_sampler.epoch = epoch
    steps, began, waited, handed = len(loader), time.perf_counter(), 0.0, time.perf_counter()
    # reading a loss makes a GPU's queue run dry, so there it is looked at when it is printed
    look_every = 1 if optimization.device.type == 'cpu' else print_frequency
    unseen = []
    for i, batch in enumerate(loader):
        waited += time.perf_counter() - handed
        losses = step(batch)
        rates = optimization.learning_rates
        grad_norm = optimization.step(sum(losses.values()))
        unseen.append((i + 1, {name: value.detach() for name, value in losses.items()}, _image_ids(batch)))
        if (i + 1) % look_every == 0 or i + 1 == steps:
            _check_finite(unseen, epoch)
            unseen = []
        if (i + 1) % print_frequency == 0 or i + 1 == steps:
            elapsed = time.perf_counter() - began
            left = elapsed / (i + 1) * (steps - i - 1 + steps * (num_epoch - epoch - 1))
            values = {name: value.item() for name, value in losses.items()} | {'grad_norm': grad_norm.item()}
            shown_rates = '  '.join(f'lr_{name} {rate:.2e}' for name, rate in rates.items() if name != 'head_bias')
            speed = (i + 1) * loader.batch_sampler.batch_size / elapsed
            who = f'seed {position["seed"]} ' if 'seed' in position else ''
            logger.info(
                f'{who}epoch {epoch + 1}/{num_epoch} step {i + 1}/{steps}  '
                + '  '.join(f'{name} {value:.4f}' for name, value in values.items())
                + f'  {shown_rates}  {speed:.1f} samples/s  waiting for data {waited / elapsed:.0%}'
                + f'  left {timedelta(seconds=round(left))}'
            )
            logger.record(
                'train', epoch * steps + i + 1,
                values | {f'lr_{name}': rate for name, rate in rates.items()} | {'samples_per_second': speed},
                epoch=epoch + 1, **position,
            )  # fmt: skip
        handed = time.perf_counter()


def _check_finite(steps, epoch):
    """InputError at the first of (step, losses, image ids) whose loss is not finite."""
    finite = torch.stack([sum(losses.values()) for _, losses, _ in steps]).isfinite().tolist()
    if not all(finite):
        step, losses, ids = steps[finite.index(False)]
        values = ', '.join(f'{name} {value.item():.4g}' for name, value in losses.items())
        raise InputError(
            f'loss is not finite at epoch {epoch + 1}, step {step} ({values}); images: {", ".join(ids)}. '
            'Lower --learning-rate, or look at these images and masks.'
        )


def fit(step, validate, net, train_loader, logger, args, config, improves, seed=None, patience=None):
    """Train from --start-epoch to --num-epoch; validate, keep `best` and `last`.

    Args:
        step (callable): see `train_epoch`.
        validate (callable): () -> confusion matrix on the validation images.
        net (POP): the network, unwrapped; what requires gradients is trained.
        train_loader (DataLoader): from `training_loader`.
        logger (RunLogger): of this run.
        args (Namespace): the training flags.
        config (dict): stored in the checkpoints (`checkpoint.network_config`).
        improves (callable): (metrics, best metrics or None) -> whether these are the new best.
        seed (int, optional): of stage 2; part of the file names.
        patience (int, optional): stop after this many epochs without a new best.

    Returns:
        dict: validation results of 'best' and of 'last'.
    """
    steps = len(train_loader)
    optimization = Optimization(
        net, args.learning_rate, args.momentum, args.weight_decay, args.num_epoch * steps,
        first_step=args.start_epoch * steps, power=0 if args.fix_lr else args.power, fp16=args.fp16,
    )  # fmt: skip
    position = {} if seed is None else {'seed': seed}
    who, suffix = ('', '') if seed is None else (f'seed {seed} ', f'_{seed}')
    best, best_epoch, metrics = None, args.start_epoch, {}

    def save(name):
        save_checkpoint(args.snapshot_dir / f'{name}{suffix}.pth', net, config, done, metrics)

    for epoch in range(args.start_epoch, args.num_epoch):
        done, metrics = epoch + 1, {}
        net.train()
        train_epoch(step, train_loader, optimization, logger, epoch, args.num_epoch, args.print_frequency, **position)
        if done % args.val_every == 0 or done == args.num_epoch:
            share_buffers(net)
            began = time.perf_counter()
            metrics = summarize(validate(), net.num_base)
            seconds = time.perf_counter() - began
            logger.record('val', done * steps, metrics | {'seconds': seconds}, epoch=done, **position)
            if improves(metrics, best):
                best, best_epoch = metrics, done
                save('best')
            shown = [f'{name} {metrics[name]:.2f} %' for name in ('base', 'novel', 'total') if metrics[name] >= 0]
            logger.info(f'{who}epoch {done}: mIoU {", ".join(shown)}; best at epoch {best_epoch} ({seconds:.1f} s)')
        save('last')
        if args.save_pred_every and done % args.save_pred_every == 0:
            save(f'epoch_{done}')
        if metrics and patience and done - best_epoch >= patience:
            logger.info(f'{who}no better result for {done - best_epoch} epochs, stopping early')
            break
    return {'best': best, 'last': metrics}


def _image_ids(batch):
    """The image ids of a batch of either stage."""
    if 'id' in batch:
        return batch['id']
    return [image_id for part in batch.values() for image_id in _image_ids(part)]


@torch.no_grad()
def evaluate(net, batches, device, fp16=False, on_prediction=None):
    """Segment images and compare with their masks.

    Args:
        net (POP): put into eval mode.
        batches (iterable of dict): from `evaluation_loader`, or with 'features' in place of 'image' (`cache`).
        device (torch.device), fp16 (bool): where and in which precision the network runs.
        on_prediction (callable, optional): called with (id, prediction uint8 [h, w], mask uint8 [h, w]) of each image.

    Returns:
        ndarray: int64 confusion matrix of all processes' images, row = truth.
    """
    net.eval()
    confusion = torch.zeros(net.num_logits, net.num_logits, dtype=torch.int64, device=device)
    scores = net.score_prototypes()
    for batch in tqdm(batches, 'evaluating', leave=False, disable=None if is_main() else True):
        if 'features' in batch:
            features = batch['features']
        else:
            with autocast(device, fp16):
                features = net.features(to_device(batch['image'], device))
        for i, mask in enumerate(batch['mask']):
            mask = mask.to(device, non_blocking=True)
            prediction = segment(net, features[i : i + 1], scores, batch['canvas'][i], mask.shape, fp16)
            confusion += confusion_matrix(mask, prediction, net.num_logits)
            if on_prediction:
                on_prediction(batch['id'][i], prediction.byte().cpu().numpy(), mask.cpu().numpy())
    return all_sum(confusion).cpu().numpy()


def segment(net, features, scores, canvas, shape, fp16=False):
    """Labels of one image from its features; what only shows padding is not computed.

    Args:
        net (POP): classifies the features.
        features (Tensor): [1, C, h, w].
        scores (tuple): the network's `score_prototypes()`.
        canvas ((int, int)): size that the whole feature map is upsampled to.
        shape ((int, int)): (H, W) of the top left part that shows the image.
        fp16 (bool): mixed precision.

    Returns:
        Tensor: int64 [H, W].
    """
    sizes = features.shape[-2:]
    rows, columns = (needed(*sides) for sides in zip(shape, canvas, sizes, strict=True))
    with autocast(features.device, fp16):
        logits = net.classify(features[:, :, :rows, :columns], scores)
    logits = F.pad(logits, (0, sizes[1] - columns, 0, sizes[0] - rows))
    return predict(logits, canvas, shape)[0]
