"""Optimisation, selection of the best epoch, and the files of a run."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RESNET, TINY_TRAINING
from torch import nn

from core.errors import InputError, exits_cleanly
from core.files import atomic_write, check_writable
from dataset.legend import Legend
from engine.loaders import training_loader
from engine.logger import RunLogger
from engine.optim import Optimization, parameter_groups
from engine.resume import RunFolder
from engine.run import Run
from engine.stage import Plan
from engine.trainer import Trainer
from ft_pop import NovelStage
from model import POP, PSP, build_model, reference
from model.losses import pop_losses
from report.tensorboard import ValidationPanel
from train_base import BaseStage

CPU = torch.device('cpu')


@pytest.mark.parametrize('num_novel', (0, 3))
def test_training_follows_the_plain_formulation_step_by_step(num_novel):
    torch.manual_seed(0)
    ours = POP(nn.Conv2d(3, 8, 1), PSP(8, 16), 4, num_novel).double()
    plain = copy.deepcopy(ours)
    curves = []
    for net in (ours, plain):
        if num_novel:
            net.freeze_base()
        optimization = Optimization(net, 0.05, 0.9, 1e-4, total_steps=6)
        generator = torch.Generator().manual_seed(1)
        curve = []
        for _ in range(6):
            images = torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)
            mask = torch.randint(0, net.num_logits, (4, 17, 17), generator=generator)
            net.train()
            trained, fixed = (net.novel_emb, net.base_emb) if num_novel else (net.base_emb, None)
            if net is ours:
                losses = pop_losses(net(images), mask, trained, fixed)
            else:
                features = reference.decode(net.decoder, net.backbone(images))
                losses = reference.losses(reference.classify(net, features), mask, trained, fixed)
            curve.append(sum(losses.values()).item())
            optimization.backward(sum(losses.values()))
            optimization.step()
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] != curves[0][0]


def test_an_overflow_in_the_first_step_leaves_momentum_clean():
    """Loss scaling starts at 65536, so the first steps of --fp16 on CUDA usually overflow and are skipped."""
    weights = {}
    for name, gradients in (('overflow', (float('inf'), 1, 1)), ('plain', (1, 1))):
        torch.manual_seed(0)
        junk = [torch.full((512, 512), float('nan')) for _ in range(20)]  # memory that is reused uninitialised
        net = nn.Linear(512, 512, bias=False)
        optimization = Optimization(net, 0.1, 0.9, 0.0, total_steps=10, power=0)
        optimization.scaler = torch.amp.GradScaler('cpu')
        del junk
        for gradient in gradients:
            net.weight.grad = torch.full_like(net.weight, gradient) * optimization.scaler.get_scale()
            optimization.scaler.scale(torch.zeros(()))  # starts the scale, as `backward` does
            optimization.step()
        weights[name] = net.weight.detach()
    assert torch.equal(weights['overflow'], weights['plain']) and weights['plain'].isfinite().all()


def test_losses_follow_the_golden_curves(run_script, shapes, tmp_path, monkeypatch):
    """Float32 losses of two short runs, as the code before any of the steps was made faster computes them."""
    # rounding decides to which side orthogonal prototypes are pushed apart: it is the sign of their products
    monkeypatch.setattr(nn.init, 'orthogonal_', lambda s: s.data.copy_(F.normalize(torch.randn(s.shape), dim=1)))
    run_script('utils/gen_fs_list.py', '--dataset', 'shapes', '--data-dir', shapes, '--shot', 1, '--seed', 123)
    common = (*TINY_RESNET, *TINY_TRAINING, '--data-dir', shapes, '--num-epoch', 2)
    base, novel = tmp_path / 'base', tmp_path / 'novel'
    golden = json.loads((Path(__file__).parent / 'golden_losses.json').read_text())
    for stage, folder, command in (
        ('stage_1', base, ('train_base.py', '--restore-from', 'none', '--batch-size', 32, '--no-memory')),
        ('stage_2', novel, ('ft_pop.py', '--restore-from', base, '--update-base')),
    ):
        code, output = run_script(*command, *common, '--snapshot-dir', folder)
        assert code == 0, output
        records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for term, curve in golden[stage].items():
            losses = [record[term] for record in records if record['kind'] == 'train']
            assert losses == pytest.approx(curve, abs=1e-5), f'{stage} {term}'


def test_parameter_groups_follow_the_recipe():
    net = build_model('resnet18', 15)
    net.backbone.layer1.requires_grad_(False)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = {group['name']: group for group in parameter_groups(net, 1e-3, 1e-4)}
    found = {name: {names[id(p)] for p in group['params']} for name, group in groups.items()}
    assert all(name.startswith('backbone.') for name in found['backbone'])
    assert 'backbone.bn1.bias' in found['backbone'] and not any('layer1' in name for name in found['backbone'])
    assert found['head_bias'] == {
        *(f'decoder.stages.{i}.2.bias' for i in range(4)), 'decoder.bottleneck.1.bias', 'decoder.bottleneck.3.bias'
    }  # fmt: skip
    assert {'base_emb', 'classifier.0.weight', 'decoder.bottleneck.1.weight'} <= found['head']
    settings = {name: (group['lr'], group['weight_decay']) for name, group in groups.items()}
    assert settings == {'backbone': (1e-3, 1e-4), 'head': (1e-2, 1e-4), 'head_bias': (1e-2, 0)}


def test_gradients_are_clipped_at_5_and_their_norm_reported():
    net = nn.Linear(4, 1, bias=False)
    before = net.weight.detach().clone()
    optimization = Optimization(net, 0.1, 0, 0, total_steps=10)
    optimization.backward((net.weight * 100).sum())  # gradient (100, 100, 100, 100)
    norm = optimization.step()
    assert norm.item() == pytest.approx(200)
    assert (before - net.weight).norm().item() == pytest.approx(0.1 * 10 * 5, rel=1e-4)


def test_the_schedule_decays_from_where_it_starts():
    for first, power, expected in ((0, 0.9, 1.0), (50, 0.9, 0.5**0.9), (50, 0, 1.0)):
        optimization = Optimization(nn.Linear(1, 1), 1e-3, 0.9, 0, total_steps=100, first_step=first, power=power)
        assert optimization.learning_rates['head'] == pytest.approx(1e-2 * expected)


@pytest.mark.parametrize(('total', 'novel', 'better'), (
    (50.0, 20.0, True),    # equal in both
    (50.05, 19.0, False),  # total up by too little, novel down
    (50.05, 20.0, True),
    (50.11, 1.0, True),    # total up by more than 0.1
    (49.99, 90.0, False),  # total down
))  # fmt: skip
def test_the_released_rule_for_best(total, novel, better):
    assert NovelStage.improves({'total': total, 'novel': novel}, {'total': 50.0, 'novel': 20.0}) is better
    assert NovelStage.improves({'total': total, 'novel': novel}, None)


@pytest.mark.parametrize(('val_every', 'stops_after', 'validated'), ((1, 5, [1, 2, 3, 4, 5]), (2, 6, [2, 4, 6])))
def test_a_run_keeps_best_and_last_and_stops_early(tmp_path, monkeypatch, val_every, stops_after, validated):
    """A scripted run: the third epoch is the best (the second and fourth where every second one is validated)."""
    correct = iter([50, 60, 70, 65, 60, 55, 50, 45] if val_every == 1 else [60, 70, 60, 50])
    monkeypatch.setattr(Trainer, 'train_epoch', lambda self: None)
    net = POP(nn.Conv2d(3, 8, 1), PSP(8, 16), 1)
    loader = training_loader(range(4), 2, seed=0, num_workers=0, device=CPU)
    legend = Legend(('background', 'thing'), (0, 1), 1, 'voc')

    calibrated = []

    class Scripted(BaseStage):
        def calibrate(self):
            calibrated.append(trainer.progress.epoch + 1)

        def validate(self):
            return np.array([[(hits := next(correct)), 100 - hits], [0, 100]]), 3

    stage = Scripted(
        net=net, model=net, val_batches=(), device=CPU, dtype=torch.float32, class_names=legend.names,
        panel=ValidationPanel(legend, read_image=None), config={'fold': 0}, seed=7, listed=4, patience=1,
    )  # fmt: skip
    run = Run(RunFolder(tmp_path, {7: {}}), {})
    plan = Plan(num_epoch=8, val_every=val_every, save_pred_every=3, print_frequency=1)
    trainer = Trainer(stage, loader, Optimization(net, 1e-3, 0.9, 0.0, total_steps=16, power=0), run, plan)
    result = trainer.fit()
    epochs = {path.stem: torch.load(path, weights_only=True)['epoch'] for path in tmp_path.glob('*.pth')}
    best = 3 if val_every == 1 else 4
    saved = {f'epoch_{n}_7': n for n in range(3, stops_after + 1, 3)}
    # epochs that are short and not the best write no `last`
    assert epochs == {'best_7': best, 'last_7': stops_after, 'previous_7': best, **saved}
    assert calibrated == sorted({*validated, *(epoch for epoch in (3, 6) if epoch <= stops_after)})
    lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    assert [line['epoch'] for line in lines] == validated
    assert result['best']['base'] > result['last']['base']
    assert result['best']['images'] == 3 and result['best']['listed_images'] == 4
    assert (tmp_path / 'log.txt').read_text().count(' on 3 of 4 images; best') == len(validated)
    stored = torch.load(tmp_path / 'epoch_3_7.pth', weights_only=True)['metrics']
    assert bool(stored) == (val_every == 1)  # results of other weights are not stored with these


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write('new')
        raise ZeroDivisionError
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match='cannot write'):
        check_writable(path / 'below')


def test_an_input_error_ends_with_its_message_and_code_1(capsys):
    @exits_cleanly
    def main(text):
        raise InputError(text)

    for text in (
        'fix it',
        'Caught InputError in DataLoader worker process 0.\n  File ...\ncore.errors.InputError: fix it\n',
    ):
        with pytest.raises(SystemExit) as end:
            main(text)
        assert end.value.code == 1
        assert capsys.readouterr().err == 'error: fix it\n'


@pytest.mark.parametrize(('broken', 'note'), (
    (('tensorboardX',), ''),
    (('tensorboardX', 'torch.utils.tensorboard'), 'no TensorBoard files'),
))  # fmt: skip
def test_a_broken_tensorboard_stops_no_run(tmp_path, monkeypatch, capsys, broken, note):
    for module in broken:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises
    if not note:
        pytest.importorskip('tensorboard', reason='without it there is no second writer')
    logger = RunLogger(tmp_path, {})
    logger.record('train', 1, {'ce': 1.0}, epoch=1)
    logger.picture('prototypes', np.zeros((4, 4, 3), np.uint8), 1)
    logger.hyperparameters({'os': 8, 'data_dir': 'caf\udce9'}, {'best_base': 1.0})  # a name that is no UTF-8
    logger.info('caf\udce9', terminal=False)
    logger.close()
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 1
    assert (tmp_path / 'tb').is_dir() is not bool(note)
    log = (tmp_path / 'log.txt').read_bytes()
    assert note.encode() in log and b'caf\xe9' in log


def test_a_collapsed_loss_scale_ends_the_run_with_the_images(tmp_path):
    net = POP(nn.Conv2d(3, 8, 1), PSP(8, 16), 1)
    optimization = Optimization(net, 1e-3, 0.9, 0.0, total_steps=16)
    optimization.scaler = torch.amp.GradScaler('cpu', init_scale=0.5)
    optimization.backward(net.base_emb.sum())
    loader = training_loader(range(4), 2, seed=0, num_workers=0, device=CPU)
    stage = BaseStage(
        net=net, model=net, val_batches=(), device=CPU, dtype=torch.float16, class_names=(), panel=None, config={}
    )  # fmt: skip
    trainer = Trainer(stage, loader, optimization, Run(RunFolder(tmp_path, {None: {}}), {}), Plan(8))
    with pytest.raises(InputError, match=r'loss scale fell to 0\.5 at epoch 1, step 3.*images: a, b.*--learning-rate'):
        trainer.check_finite([(3, {'ce': torch.ones(()), 'grad_norm': torch.ones(())}, ['a', 'b'])])
