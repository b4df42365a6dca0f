"""Panels of an iteration: pixel values, and the hook on a fake model."""

from __future__ import annotations

import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from mmseg_contrast.adaptation.view import View
from mmseg_contrast.engine.hooks import (
    PseudoLabelHealthHook,
    UDAVisualizationHook,
)
from mmseg_contrast.engine.hooks.panel import (
    GAP,
    LINE,
    TITLE,
    Column,
    colorize,
    compose,
    default_palette,
    denormalize,
    heat,
)

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 250]], np.uint8)
CLASSES = ['road', 'car', 'sky']
MEAN, STD = [123., 117., 104.], [58., 57., 56.]


def test_labels_get_their_colours_and_ignored_pixels_a_grey_hatch():
    labels = np.full((8, 8), 255)
    labels[0, 1], labels[7, 7], labels[3, 3] = 1, 2, -1
    image = colorize(labels, PALETTE)
    assert image.dtype == np.uint8
    assert image[0, 1].tolist() == [200, 0, 0]
    assert image[7, 7].tolist() == [0, 0, 250]
    assert image[0, 0].tolist() == [115] * 3
    assert image[3, 3].tolist() == [150] * 3  # (3 + 3) // 4 is odd
    assert image[0, 4].tolist() == [150] * 3


def test_heat_has_a_fixed_scale_and_dims_below_the_threshold():
    flat = heat(np.full((2, 2), 0.5))
    ramp = heat(np.array([[0., 0.5, 1.]]))
    assert (flat[0, 0] == ramp[0, 1]).all()  # not scaled to its own range
    assert ramp[0, 2].astype(int).sum() > ramp[0, 0].astype(int).sum()
    dim = heat(np.array([[0., 0.5, 1.]]), threshold=0.5)
    assert (dim[0, 0] == ramp[0, 0] // 2).all()
    assert (dim[0, 1:] == ramp[0, 1:]).all()


def test_denormalize():
    images = np.zeros((1, 3, 2, 2), np.float32)
    images[0, 1, 0, 1] = 1.
    images[0, 2, 0, 1] = 9.
    photo = denormalize(images, np.array(MEAN), np.array(STD))
    assert photo[0, 0, 0].tolist() == [123, 117, 104]
    assert photo[0, 0, 1].tolist() == [123, 174, 255]
    assert denormalize(images, None, None)[0, 0, 1].tolist() == [0, 1, 9]


def test_tiles_lie_where_they_should():
    def flat(color, height=4, width=8):
        return np.full((height, width, 3), color, np.uint8)

    columns = [Column('a', [flat(1), flat(2)]),
               Column('b', [flat(3, 8, 8), flat(4)])]
    panel = compose(columns, CLASSES, PALETTE, tile_width=80)
    left, right, top = GAP, GAP + 80 + GAP, TITLE + GAP
    # 40 high, next to a tile that is 80 high
    assert (panel[top:top + 40, left:left + 80] == 1).all()
    assert (panel[top + 40:top + 80, left:left + 80] == 255).all()
    assert (panel[top:top + 80, right:right + 80] == 3).all()
    second = top + 80 + GAP
    assert (panel[second:second + 40, left:left + 80] == 2).all()
    assert (panel[second:second + 40, right:right + 80] == 4).all()
    assert panel.shape[1] == 3 * GAP + 160
    # the legend: a square of each class's colour
    legend = panel[second + 40 + GAP:]
    assert legend.shape[0] % LINE == 0
    for color in PALETTE:
        assert (legend == color).all(-1).sum() == (LINE - 8)**2
    assert (panel[:TITLE] < 128).any()  # titles


def test_label_maps_are_not_blurred_when_scaled():
    tile = colorize(np.array([[0, 1, 2, 1, 0]]), PALETTE)
    panel = compose([Column('x', [tile])], [], PALETTE, tile_width=93)
    row = panel[TITLE + GAP, GAP:GAP + 93]
    assert {tuple(p) for p in row.tolist()} == {
        tuple(c) for c in PALETTE.tolist()}


def test_legend_wraps_and_takes_a_scale_bar():
    tile = np.zeros((4, 8, 3), np.uint8)
    many = [f'class number {i}' for i in range(20)]
    panel = compose([Column('x', [tile])], many, default_palette(20),
                    threshold=0.25, scale_bar=True, tile_width=240)
    bar = panel[TITLE + GAP + 120 + GAP:][:LINE]
    red = (bar == (220, 0, 0)).all(-1)
    assert red.sum() == LINE - 2 and red.any(0).sum() == 1
    at = int(np.flatnonzero(red.any(0))[0])
    zero = at - 25  # 101 pixels for [0, 1]
    scale = heat(np.linspace(0, 1, 101)[None], 0.25)[0]
    assert (bar[8, zero:at] == scale[:25]).all()
    assert (bar[8, at + 1:zero + 101] == scale[26:]).all()
    assert panel.shape[0] > TITLE + GAP + 120 + GAP + 5 * LINE


def test_default_palette_is_distinct():
    assert len({tuple(c) for c in default_palette(19).tolist()}) == 19


class Model(nn.Module):
    """Leaves a step as UDASegmentor does."""

    def __init__(self, full=True, normalize=True, binary=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.num_classes, self.align_corners = 3, False
        self.keep_step, self.last_step, self.full = False, None, full
        self.pseudo_labels = {
            'target': SimpleNamespace(threshold=0.5)} if full else {}
        self.data_preprocessor = SimpleNamespace(base=SimpleNamespace(
            mean=torch.tensor(MEAN).view(3, 1, 1),
            std=torch.tensor(STD).view(3, 1, 1), _enable_normalize=normalize))
        self.binary = binary
        self.drawn = 0  # iterations in which a step was kept

    def iterate(self):
        shape = (3, 6, 8)
        images = torch.zeros(3, 3, 6, 8)
        labels = torch.ones(shape, dtype=torch.long)
        labels[:, 0] = 255
        views = {'source': View('source', images, 'source', labels=labels)}
        step = SimpleNamespace(views=views, pseudo_labels={}, students={})
        logits = torch.zeros(3, 3, 3, 4, requires_grad=True) + torch.tensor(
            [0., 0., 5.]).view(3, 1, 1)
        if self.binary:
            logits = torch.ones(3, 1, 3, 4)
        seen = SimpleNamespace(logits=logits)
        if self.full:
            views['target'] = View('target', images + 1, 'target')
            views['mixed_strong'] = View(
                'mixed_strong', images - 1, 'source+target', labels=labels)
            step.pseudo_labels['target'] = SimpleNamespace(
                labels=torch.zeros(shape, dtype=torch.long),
                confidence=torch.full(shape, 0.9),
                weights=torch.ones(shape))
            step.students['mixed_strong'] = seen
        else:
            step.students['source'] = seen
        self.drawn += self.keep_step
        self.last_step = step if self.keep_step else None


class Visualizer:
    def __init__(self):
        self.images = {}

    def add_image(self, name, image, step):
        self.images[name, step] = image

    def add_scalars(self, scalars, step):
        pass


def fake_runner(model, folder):
    dataset = SimpleNamespace(
        metainfo=dict(classes=CLASSES, palette=PALETTE.tolist()))
    return SimpleNamespace(
        model=model, iter=0, work_dir=str(folder), visualizer=Visualizer(),
        train_dataloader=SimpleNamespace(dataset=dataset),
        message_hub=SimpleNamespace(update_scalar=lambda *a: None))


def train(runner, hooks, iterations):
    for hook in hooks:
        hook.before_train(runner)
    for runner.iter in range(iterations):
        for hook in hooks:
            hook.before_train_iter(runner, runner.iter)
        runner.model.iterate()
        for hook in hooks:
            hook.after_train_iter(runner, runner.iter)


def tile(panel, column, row=0, width=80, height=60):
    top = TITLE + GAP + row * (height + GAP)
    left = GAP + column * (width + GAP)
    return panel[top:top + height, left:left + width]


def test_hook_draws_the_whole_iteration(tmp_path):
    runner = fake_runner(Model(), tmp_path)
    train(runner, [UDAVisualizationHook(interval=2, tile_width=80)], 4)
    names = sorted(p.name for p in (tmp_path / 'panels').iterdir())
    assert names == [f'iter_00000{i}.png' for i in (1, 2, 4)]
    assert runner.model.drawn == 3  # no step is kept in vain
    panel = cv2.cvtColor(
        cv2.imread(str(tmp_path / 'panels' / names[0])), cv2.COLOR_BGR2RGB)
    assert (runner.visualizer.images['uda_panel', 1] == panel).all()
    assert set(runner.visualizer.images) == {
        ('uda_panel', i) for i in (1, 2, 4)}
    assert panel.shape[1] == GAP + 8 * (80 + GAP)
    expected = [
        [123, 117, 104], PALETTE[1], [181, 174, 160], PALETTE[0],
        heat(np.array([[0.9]]))[0, 0], [65, 60, 48], PALETTE[1], PALETTE[2]]
    for column, color in enumerate(expected):
        for row in range(2):
            body = tile(panel, column, row)[10:]  # the top row is ignored
            assert (body == color).all(), (column, row)
    for column in (1, 6):  # labels
        edge = tile(panel, column)[:10]
        assert set(np.unique(edge)) == {115, 150}


def test_hook_leaves_out_what_isnt_there(tmp_path):
    runner = fake_runner(Model(full=False), tmp_path)
    train(runner, [UDAVisualizationHook(max_samples=1, tile_width=80)], 1)
    panel = runner.visualizer.images['uda_panel', 1]
    assert panel.shape[1] == GAP + 3 * (80 + GAP)
    assert (tile(panel, 2) == PALETTE[2]).all()  # prediction on the source


def test_number_of_rows(tmp_path):
    model = Model()
    runner = fake_runner(model, tmp_path)
    plain = model.iterate

    def iterate():  # no prediction, which alone would cut the rows
        plain()
        model.last_step.students.clear()

    model.iterate = iterate
    train(runner, [UDAVisualizationHook(max_samples=2, tile_width=80)], 1)
    panel = runner.visualizer.images['uda_panel', 1]
    assert panel.shape[1] == GAP + 7 * (80 + GAP)
    rows = panel.shape[0] - TITLE - GAP
    assert 2 * (60 + GAP) < rows < 3 * (60 + GAP)


def test_images_without_normalisation_and_binary_heads(tmp_path):
    model = Model(normalize=False, binary=True)
    model.data_preprocessor.base.channel_conversion = False
    runner = fake_runner(model, tmp_path)
    train(runner, [UDAVisualizationHook(tile_width=80)], 1)
    panel = runner.visualizer.images['uda_panel', 1]
    assert (tile(panel, 2) == 1).all()
    assert (tile(panel, 7) == PALETTE[1]).all()


def test_channels_that_were_never_turned_are_shown_as_rgb(tmp_path):
    model = Model()
    model.data_preprocessor.base._channel_conversion = False
    runner = fake_runner(model, tmp_path)
    train(runner, [UDAVisualizationHook(tile_width=80)], 1)
    panel = runner.visualizer.images['uda_panel', 1]
    assert (tile(panel, 0) == [104, 117, 123]).all()


def test_random_state_and_modes_stay(tmp_path):
    runner = fake_runner(Model(), tmp_path)
    runner.model.train()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(),
              random.getstate())
    train(runner, [UDAVisualizationHook(interval=1)], 2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert runner.model.training
    assert runner.model.weight.grad is None


@pytest.mark.parametrize('reverse', [False, True])
def test_both_hooks_get_every_step_they_ask_for(tmp_path, reverse):
    hooks = [UDAVisualizationHook(interval=2, first=False),
             PseudoLabelHealthHook(interval=3, report_interval=3)]
    counted = []
    hooks[1]._count = counted.append
    runner = fake_runner(Model(), tmp_path)
    train(runner, hooks[::-1] if reverse else hooks, 5)
    assert len(counted) == 5
    assert len(runner.visualizer.images) == 2
    # gone before the next forward pass
    for hook in hooks:
        runner.model.last_step = 'old'
        hook.before_train_iter(runner, 5)
        assert runner.model.last_step is None


def test_other_models_are_refused(tmp_path):
    runner = fake_runner(nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match='UDAVisualizationHook.*UDASegment'):
        UDAVisualizationHook().before_train(runner)
    with pytest.raises(ValueError, match='interval'):
        UDAVisualizationHook(interval=0)
