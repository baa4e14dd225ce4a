"""Results of an evaluation: tables for the screen, results.md, results.json, and the figures of `test.py --plots`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import atomic_write, json_ready
from dataset import FoldData
from dataset.legend import Legend
from engine.metrics import SUMMARY, iou_per_class, summarize
from report.figures import confusion_figure, iou_figure, similarity_figure, support_figure
from report.plotting import save_figure
from report.tables import class_table, mean_and_std, summary_table


def seed_result(
    checkpoint: Path | str, confusion: np.ndarray, legend: Legend, images: int, listed_images: int,
    base_size: tuple[int, int], views: str = '',
) -> dict:  # fmt: skip
    """The result of one seed.

    Args:
        checkpoint: path of what was evaluated.
        confusion: int64 [K, K], row = truth.
        legend: names and colours of the K labels.
        images: number of images that it rests on.
        listed_images: number of images in the evaluation list.
        base_size: (H, W) that images are resized to fit.
        views: how images were shown to the network, where not in one pass.

    Returns:
        'checkpoint', 'views' where there are any, 'base_size', 'images', 'listed_images', 'classes_without_pixels'
        (names of classes that no mask shows), the keys of `SUMMARY`, and 'iou' by class name, in percent.
    """
    first = 1 if legend.background is None else 0
    return {
        'checkpoint': str(checkpoint),
        **({'views': views} if views else {}),
        'base_size': list(base_size),
        'images': images,
        'listed_images': listed_images,
        'classes_without_pixels': [legend.names[k] for k in np.flatnonzero(confusion.sum(axis=1) == 0) if k >= first],
        **summarize(confusion, legend.num_base),
        'iou': dict(zip(legend.names, iou_per_class(confusion).tolist(), strict=True)),
    }


def basis(result: dict) -> str:
    """What a `seed_result` rests on, in words."""
    images, listed = result['images'], result['listed_images']
    height, width = result['base_size']
    text = f'Evaluated at {height}x{width} on {images} of {listed} images'
    text += f'; {listed - images} could not be read and were skipped.' if images < listed else '.'
    text += f' Views: {result["views"]}.' if 'views' in result else ''
    if absent := result['classes_without_pixels']:
        text += f' No pixel of {", ".join(absent)}: IoU 0 where predicted, otherwise left out of the means.'
    return text


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of one or several seeds on one fold.

    Attributes:
        seeds: seed -> `seed_result`.
        legend: names and colours of the labels that the networks predict.
        dataset, fold: what was evaluated.
        shot: support images of each novel class; None: chosen by hand, so that classes may differ. Not reported if
            there are no novel classes.
        precision: name of the type that the networks ran in.
        model, options: one of `model.MODELS`, and its options (`Network.OPTIONS`).
    """

    seeds: dict[int, dict]
    legend: Legend
    dataset: str
    fold: int
    shot: int | None
    precision: str
    model: str
    options: Mapping[str, str]

    @property
    def weights(self) -> str:
        """Which weights: 'best' for best_123.pth. From the files' names, as --select does not apply to a file."""
        names = {Path(r['checkpoint']).stem.removesuffix(f'_{seed}'): None for seed, r in self.seeds.items()}
        return ', '.join(names)

    @property
    def stage(self) -> int:
        """2 where the network has novel classes, else 1."""
        return 2 if self.legend.novel_labels else 1

    @property
    def title(self) -> str:
        shots = 'support images chosen by hand' if self.shot is None else f'{self.shot}-shot'
        shots = shots if self.stage == 2 else 'base classes only'
        return f'{self.dataset} fold {self.fold}, {shots}, weights "{self.weights}"'

    def columns(self) -> dict[str, list[float]]:
        """Key of `SUMMARY` -> the seeds' values in percent."""
        return {key: [result[key] for result in self.seeds.values()] for key in SUMMARY}

    def tables(self) -> str:
        """Means of each seed and over seeds, what they rest on, and IoU of each class, as Markdown."""
        rows = {f'seed {seed}': result for seed, result in self.seeds.items()}
        if len(self.seeds) > 1:
            rows['mean ± std'] = {key: mean_and_std(values) for key, values in self.columns().items()}
        bases = {seed: basis(result) for seed, result in self.seeds.items()}
        if len(set(bases.values())) == 1:
            rests_on = next(iter(bases.values()))
        else:
            rests_on = '\n'.join(f'Seed {seed}: {text}' for seed, text in bases.items())
        text = f'{self.title}, mIoU in %\n\n{summary_table(rows)}\n\n{rests_on}\n'
        names, first_novel = self.legend.names, self.legend.num_base + 1
        for kind, of_kind in (('background and base', names[:first_novel]), ('novel', names[first_novel:])):
            if of_kind:
                ious = {f'seed {seed}': {name: r['iou'][name] for name in of_kind} for seed, r in self.seeds.items()}
                text += f'\nIoU of {kind} classes in %\n\n{class_table(ious)}\n'
        return text

    def write(self, folder: Path):
        """Write results.md and results.json."""
        with atomic_write(folder / 'results.md') as file:
            file.write(self.tables())
        columns = self.columns()
        summary = {
            'dataset': self.dataset, 'fold': self.fold, 'stage': self.stage,
            'shot': self.shot if self.stage == 2 else None, 'model': self.model, 'options': dict(self.options),
            'weights': self.weights, 'precision': self.precision, 'seeds': self.seeds,
            'mean': {key: float(np.mean(values)) for key, values in columns.items()},
            'std': {key: float(np.std(values)) for key, values in columns.items()},
        }  # fmt: skip
        with atomic_write(folder / 'results.json') as file:
            json.dump(json_ready(summary), file, indent=2)

    def draw(self, folder: Path):
        """Draw the IoU of each class over all seeds: iou.png."""
        ious = np.array([list(result['iou'].values()) for result in self.seeds.values()])
        _save(folder / 'iou.png', iou_figure(ious, self.legend, self.title))


def draw_seed(
    folder: Path, seed: int, *, confusion: np.ndarray, prototypes: Sequence, legend: Legend, data: FoldData, shot: int,
    chosen: Mapping[int, Sequence[str]] | None = None,
):  # fmt: skip
    """Draw the figures of one seed: confusion matrix, similarity of prototypes and, in stage 2, the support images.

    `chosen` are those that were chosen by hand, as `FoldData.supports` gives them; else they are the drawn ones.
    """
    figures = {'confusion': confusion_figure(confusion, legend), 'prototypes': similarity_figure(prototypes, legend)}
    if legend.novel_labels and data.taught is None:
        try:
            supports = list((chosen or data.checked_supports(shot, seed)).values())
            samples = data.samples('train', [i for ids in supports for i in ids], novel_as_background=False)
            figures['support'] = support_figure([[(i, *samples.read(i)) for i in ids] for ids in supports], legend)
        except InputError as error:  # the other figures do not need the training images
            print(f'no picture of the support images: {error}')
    for name, figure in figures.items():
        _save(folder / f'{name}_{seed}.png', figure)


def _save(path, figure):
    save_figure(path, figure)
    print(f'picture: {path}')
