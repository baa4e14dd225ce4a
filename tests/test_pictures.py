"""Pictures: colours of known pixels, sizes, and the choice of example images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from dataset.legend import Legend, colors_of, voc_palette
from report.arrays import similarity
from report.curves import curves_figure, read_metrics
from report.figures import ERRORS, confusion_figure, error_map, iou_figure, support_figure
from report.panels import ImageScores, PanelWriter, choose_examples
from report.plotting import save_figure
from report.tensorboard import ValidationPanel, similarity_picture
from utils import plot

LEGEND = Legend(('background', 'cat', 'dog', 'new'), (0, 8, 12, 3), num_base=2, palette='voc')


def labels():
    """Truth and prediction, 40x60 pixels with every kind of error."""
    truth = np.zeros((40, 60), np.uint8)
    truth[:20, :30], truth[:20, 30:] = 1, 3
    truth[39] = 255
    prediction = truth.copy() % 255
    prediction[0, :30], prediction[0, 30:], prediction[30] = 0, 2, 1
    return truth, prediction


def image(_id=None):
    return np.full((40, 60, 3), 90, np.uint8)


def test_colours_of_the_spread_palette_differ():
    colors = colors_of('spread')[:81].astype(int)
    distances = np.abs(colors[:, None] - colors[None]).sum(2) + 1000 * np.eye(81, dtype=int)
    assert colors[0].tolist() == [0, 0, 0] and distances.min() > 8


def test_a_class_has_one_colour_in_all_folds():
    assert LEGEND.colors[1].tolist() == voc_palette()[8].tolist()
    assert LEGEND.colors[3].tolist() == voc_palette()[3].tolist() and list(LEGEND.novel_labels) == [3]
    assert LEGEND.colors[255].tolist() == [255, 255, 255]
    assert LEGEND.cut(3).names == ('background', 'cat', 'dog') and not LEGEND.cut(3).novel_labels


def test_each_kind_of_error_has_its_colour():
    colors = error_map(*labels())
    correct, missed, invented, other, ignored = (list(color) for color in ERRORS.values())
    assert colors[5, 5].tolist() == correct and colors[25, 5].tolist() == correct
    assert colors[0, 5].tolist() == missed and colors[30, 5].tolist() == invented
    assert colors[0, 40].tolist() == other and colors[39, 5].tolist() == ignored


def test_panels_show_the_classes_in_their_colours(tmp_path):
    truth, prediction = labels()
    panels = PanelWriter(LEGEND, image, tmp_path, {'a': 'worst1'}, {'a': (12.3, True)})
    panels('a', torch.tensor(prediction), torch.tensor(truth))
    picture = np.asarray(Image.open(tmp_path / 'worst1_a.png').convert('RGB')).astype(int)
    assert picture.shape[1] == 1200 and 200 < picture.shape[0] < 500
    for color in (*LEGEND.colors[[1, 3]], *list(ERRORS.values())[:4], (90, 90, 90)):
        assert (np.abs(picture - np.array(color)).sum(2) <= 3).sum() > 40, color


def test_the_validation_panel_shows_the_same_images_each_time():
    truth, prediction = labels()
    without_novel = np.where(truth == 3, 0, truth)
    panel = ValidationPanel(LEGEND, image, count=2, side=60)
    assert panel.draw() is None
    for _ in range(2):
        for image_id, mask in (('x', without_novel), ('a', truth), ('b', truth), ('c', truth)):
            panel(image_id, torch.tensor(prediction), torch.tensor(mask))
        picture = panel.draw()
        assert picture.shape == (120, 180, 3) and picture.dtype == np.uint8
        assert picture[5, 5].tolist() == [90] * 3 and picture[50, 5].tolist() == [128] * 3  # image, margin
        assert picture[0, 65].tolist() == LEGEND.colors[1].tolist()  # truth
        assert picture[0, 125].tolist() == [0, 0, 0]  # prediction: missed
        prediction = np.where(prediction == 1, 2, prediction)
    assert picture[65, 125].tolist() == LEGEND.colors[2].tolist()  # the latest prediction of 'b'


def test_images_are_scored_and_written(tmp_path):
    truth, prediction = labels()
    scores = ImageScores(LEGEND, tmp_path)
    scores('a', torch.tensor(prediction), torch.tensor(truth))
    scores('b', torch.tensor(truth % 255), torch.tensor(np.where(truth == 3, 1, truth)))
    # by hand; row 39 is not counted
    cat, dog, new = (19 * 30) / (20 * 30 + 60), 0, 19 / 20
    counted = truth != 255
    both = ((truth == 0) & (prediction == 0)).sum()
    background = both / (((truth == 0) | (prediction == 0)) & counted).sum()
    assert scores.scores['a'] == (pytest.approx(25 * (background + cat + dog + new)), True)
    assert scores.scores['b'][1] is False
    written = Image.open(tmp_path / 'a.png')
    assert written.mode == 'P' and written.getpixel((40, 10)) == 3 and written.getpixel((5, 10)) == 8
    assert written.getpalette()[24:27] == voc_palette()[8].tolist()


def test_examples_are_worst_median_best_and_novel():
    scores = {f'{i}': (float(i), i in (2, 3, 9)) for i in range(11)}
    assert choose_examples(scores, 4) == {'0': 'worst1', '5': 'median1', '10': 'best1', '3': 'novel1'}
    six = choose_examples(scores, 6)
    assert list(six)[4:] == ['1', '4'] and six['4'] == 'median2'
    assert len(choose_examples(scores, 50)) == 11
    assert choose_examples({}, 3) == {}


def test_similarity_of_prototypes():
    prototypes = (torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([[-1.0, 0]]))
    assert similarity(prototypes) == pytest.approx(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 1]]))
    picture = similarity_picture(prototypes, side=30)
    assert picture.shape == (30, 30, 3)
    red, white, blue = picture[5, 5], picture[5, 15], picture[5, 25]
    assert red[0] > red[2] and blue[2] > blue[0] and white.min() > 240


def test_figures_of_results(tmp_path):
    confusion = np.array([[50, 0, 0, 0], [10, 30, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    ious = np.array([[80.0, 60, np.nan, 10], [70, 40, np.nan, 30]])
    truth, _ = labels()
    figures = {
        'confusion': confusion_figure(confusion, LEGEND),
        'iou': iou_figure(ious, LEGEND, 'title'),
        'support': support_figure([[('a', image(), truth), ('b', image(), truth)]], LEGEND),
    }
    texts = {text.get_text() for text in figures['confusion'].axes[0].texts}
    assert texts == {'100', '25', '75'}  # percent of the row
    axis = figures['iou'].axes[0]
    assert [bar.get_width() for bar in axis.patches][:4] == [75, 50, 0, 20]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ['background and base: mean 62.5 %', 'novel: mean 20.0 %']
    for name, figure in figures.items():
        save_figure(tmp_path / f'{name}.png', figure)
        assert min(Image.open(tmp_path / f'{name}.png').size) > 150


@pytest.mark.parametrize('backend', ('module://of_a_notebook', 'no such backend', 'TkAgg'))
def test_the_backend_of_another_program_does_not_matter(tmp_path, backend):
    """A notebook's MPLBACKEND reaches the commands that it starts, and may not be installed for them."""
    script = (
        'import os; from pathlib import Path; from report.plotting import Figure, save_figure; '
        "figure = Figure(); figure.subplots().plot([0, 1]); save_figure(Path('f.png'), figure); "
        "assert os.environ['MPLBACKEND'] == " + repr(backend)
    )
    env = os.environ | {'MPLBACKEND': backend, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / 'f.png').size == (640, 480)


def test_curves_of_runs(tmp_path, base_run, few_shot_run, capsys):
    plot.main(plot.parse_args([str(base_run), str(few_shot_run), '--out', str(tmp_path / 'both')]))
    assert 'both.png' in capsys.readouterr().out
    assert Image.open(tmp_path / 'both.png').size[0] == 1100
    assert (tmp_path / 'both.svg').read_text().startswith('<?xml')
    runs = {'one': read_metrics(base_run), 'two': read_metrics(few_shot_run)}
    figure = curves_figure(runs)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ['one', 'two, seed 123', 'two, seed 234']
    untrained = {name: [each for each in records if each['kind'] == 'val'] for name, records in runs.items()}
    assert [text.get_text() for text in curves_figure(untrained).legends[0].get_texts()] == names
    drawn = figure.axes[2].lines[0].get_ydata()
    assert list(drawn) == [record['base'] for record in runs['one'] if record['kind'] == 'val']
    for content in (None, b'', b'no json\n', b'\xff\xfe{\n', b'[1]\n', b'[' * 10**5):
        broken = tmp_path / 'broken'
        broken.mkdir(exist_ok=True)
        if content is not None:
            (broken / 'metrics.jsonl').write_bytes(content)
        with pytest.raises(SystemExit) as end:
            plot.main(plot.parse_args([str(broken)]))
        assert end.value.code == 1 and str(broken) in capsys.readouterr().err


def test_the_test_script_draws_panels_and_plots(run_script, shapes, few_shot_run, tmp_path):
    code, output = run_script(
        'test.py', *TINY, '--data-dir', shapes, '--restore-from', few_shot_run, '--random-seed', '123,234',
        '--save-path', tmp_path, '--overlay', 4, '--plots',
    )  # fmt: skip
    assert code == 0, output
    pictures = [line.removeprefix('picture: ') for line in output.splitlines() if line.startswith('picture: ')]
    assert len(pictures) == len(set(pictures)) == 2 * (4 + 3) + 1
    assert all(min(Image.open(path).size) > 150 for path in pictures)
    kinds = sorted(path.name.split('_')[0] for path in (tmp_path / 'overlay_123').iterdir())
    assert kinds == ['best1', 'median1', 'novel1', 'worst1']
    plots = {path.name for path in (tmp_path / 'plots').iterdir()}
    assert plots == {'iou.png'} | {f'{n}_{s}.png' for n in ('confusion', 'prototypes', 'support') for s in (123, 234)}
    tables = (tmp_path / 'results.md').read_text()
    assert 'IoU of background and base classes' in tables and 'IoU of novel classes' in tables
    results = json.loads((tmp_path / 'results.json').read_text())
    novel = tables.split('IoU of novel classes in %')[1]
    rows = [line.split('|') for line in novel.splitlines() if 'disc' in line]
    assert len(rows) == 5
    for _, name, first, *_ in rows:
        value = results['seeds']['123']['iou'][name.strip()]
        assert first.strip() == ('-' if value is None else f'{value:.2f}')


def test_tensorboard_holds_curves_pictures_and_hyperparameters(few_shot_run):
    content = b''.join(path.read_bytes() for path in (few_shot_run / 'tb').rglob('events.out.*'))
    for name in (
        'train_123/ce', 'train_234/lr_head', 'train_123/images_per_second', 'val_123/total', 'val_234/iou/',
        'predictions_123', 'prototypes_234', 'best_novel', 'learning_rate',
    ):  # fmt: skip
        assert name.encode() in content, name
    records = [json.loads(line) for line in (few_shot_run / 'metrics.jsonl').read_text().splitlines()]
    validations = [record for record in records if record['kind'] == 'val']
    for record in validations:
        assert len(record['iou']) == 21 and 'background' in record['iou']
        values = [value for value in record['iou'].values() if value is not None]
        assert record['total'] == pytest.approx(np.mean(values))
