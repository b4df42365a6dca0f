"""Health of pseudo-labels: histograms, scalars, warnings."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmseg_contrast.engine.hooks import pseudo_label_health
from mmseg_contrast.engine.hooks.pseudo_label_health import (
    PseudoLabelHealthHook,
    total_variation,
)

CLASSES = ['road', 'car', 'traffic light', 'train']


class Model(nn.Module):
    """Gives the steps it was told to."""

    def __init__(self, steps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.num_classes = len(CLASSES)
        self.keep_step, self.last_step = False, None
        self.pseudo_labels = {'target': None}
        self.steps = iter(steps)

    def iterate(self):
        step = next(self.steps)
        self.last_step = step if self.keep_step else None


def make_step(labels, source=None, weights=None, confidence=None):
    labels = torch.tensor(labels).view(1, 1, -1)
    if weights is None:
        weights = torch.ones(labels.shape)
    if confidence is None:
        confidence = torch.ones(labels.shape)
    pseudo = SimpleNamespace(
        labels=labels, weights=torch.as_tensor(weights).view_as(labels),
        confidence=torch.as_tensor(confidence).view_as(labels))
    views = {}
    if source is not None:
        views['source'] = SimpleNamespace(
            labels=torch.tensor(source).view(1, 1, -1))
    return SimpleNamespace(views=views, pseudo_labels=dict(target=pseudo))


@pytest.fixture
def log(monkeypatch):
    lines = []

    def keep(text, logger=None, level=logging.INFO):
        lines.append((level, text))

    monkeypatch.setattr(pseudo_label_health, 'print_log', keep)
    return lines


def warnings(log):
    return [text for level, text in log if level == logging.WARNING]


def train(hook, steps):
    scalars, hub = {}, {}
    runner = SimpleNamespace(
        model=Model(steps), iter=0,
        train_dataloader=SimpleNamespace(
            dataset=SimpleNamespace(metainfo=dict(classes=CLASSES))),
        visualizer=SimpleNamespace(
            add_scalars=lambda d, step: scalars.update({step: d})),
        message_hub=SimpleNamespace(
            update_scalar=lambda k, v: hub.setdefault(k, []).append(v)))
    hook.before_train(runner)
    for runner.iter in range(len(steps)):
        hook.before_train_iter(runner, runner.iter)
        runner.model.iterate()
        hook.after_train_iter(runner, runner.iter)
    return scalars, hub


def test_total_variation():
    first, second = torch.tensor([6., 2., 0.]), torch.tensor([1., 1., 2.])
    assert float(total_variation(first, second)) == pytest.approx(0.5)
    assert total_variation(first, torch.zeros(3)).isnan()


def test_scalars_of_an_interval(log):
    steps = [
        make_step([0, 0, 1, 255], source=[0, 1, 2, 255],
                  weights=[1., 0., .5, 1.], confidence=[.9, .5, .8, .1]),
        make_step([0, 2, 0, 1], source=[0, 0, 1, 0],
                  weights=[.1, .1, 0., 0.], confidence=[.7, .6, .3, .4]),
        make_step([3, 3, 3, 3], source=[0, 0, 0, 0])]
    scalars, hub = train(
        PseudoLabelHealthHook(interval=2, report_interval=2), steps)
    assert list(scalars) == [2]  # the third is in no full interval
    # weighted pixels: road 2, car 1, light 1; source: road 4, car 2, light 1
    expected = {
        'health/road_share': 0.5, 'health/car_share': 0.25,
        'health/traffic_light_share': 0.25, 'health/train_share': 0.,
        'health/road_source_share': 4 / 7, 'health/car_source_share': 2 / 7,
        'health/traffic_light_source_share': 1 / 7,
        'health/train_source_share': 0.,
        # of all pixels, weighted or not; nothing to say of trains
        'health/road_confidence': (.9 + .5 + .7 + .3) / 4,
        'health/car_confidence': (.8 + .4) / 2,
        'health/traffic_light_confidence': .6,
        'health/total_variation': .5 * (
            4 / 7 - .5 + 2 / 7 - .25 + .25 - 1 / 7)}
    assert scalars[2] == pytest.approx(expected)
    assert hub == {'train/health.total_variation':
                   [pytest.approx(expected['health/total_variation'])]}
    assert len(log) == 1
    assert 'road 50.00/57.14 (0.60), car 25.00/28.57 (0.60)' in log[0][1]
    assert log[0][1].endswith('train 0.00/0.00')


def test_a_report_covers_its_own_iterations(log):
    steps = [make_step([c], source=[0]) for c in (0, 1, 1, 1, 2, 2, 0, 0)]
    scalars, _ = train(
        PseudoLabelHealthHook(interval=2, report_interval=4), steps)
    assert [scalars[n]['health/car_share'] for n in (2, 4, 6, 8)] == [
        .5, 1., 0., 0.]
    shares = [text.split('confidence): ')[1] for _, text in log]
    assert [s.split(',')[0] for s in shares] == [
        'road 25.00/100.00 (1.00)', 'road 50.00/100.00 (1.00)']


def test_nothing_counted(log):
    steps = [make_step([0, 1], weights=[0., 0.])] * 2
    scalars, hub = train(
        PseudoLabelHealthHook(interval=2, report_interval=2), steps)
    assert set(scalars[2]) == {
        'health/road_confidence', 'health/car_confidence'}
    assert hub == {}
    assert 'none counted' in log[0][1]
    empty = SimpleNamespace(views={}, pseudo_labels={})
    scalars, _ = train(PseudoLabelHealthHook(
        interval=1, report_interval=1), [empty])
    assert scalars == {}


def hook_per_iteration(**kwargs):
    return PseudoLabelHealthHook(interval=1, report_interval=1, **kwargs)


GOOD, LOST = [0] * 7 + [1] * 3, [0] * 10


def test_a_vanished_class_is_named_once_until_it_recovers(log):
    source = [0] * 8 + [1] * 2

    def run(*labels):
        log.clear()
        train(hook_per_iteration(patience=2, momentum=0.),
              [make_step(one, source=source) for one in labels])
        return warnings(log)

    assert run(GOOD, LOST) == []  # patience
    assert run(GOOD, LOST, GOOD, LOST, GOOD) == []
    once = run(GOOD, *[LOST] * 6)
    assert len(once) == 1
    assert once[0].startswith(
        "Class 'car' has vanished from the pseudo-labels: 0.000% of their "
        'pixels, 30.000% before, 20.000% in the source (2 reports in a row)')
    assert 'rare_class' in once[0]
    assert len(run(GOOD, *[LOST] * 3, GOOD, *[LOST] * 3)) == 2


def test_a_class_may_fall_below_the_source_or_its_own_past(log):
    few = [0] * 99 + [1]
    # never seen among pseudo-labels, but frequent in the source
    train(hook_per_iteration(patience=1), [make_step(LOST, source=few)])
    assert len(warnings(log)) == 1
    log.clear()
    # 1% of 30% is the limit: 1 of 1,000 is below, 4 of 1,000 isn't
    for count, number in ((1, 1), (4, 0)):
        log.clear()
        train(hook_per_iteration(patience=1), [
            make_step(GOOD),
            make_step([1] * count + [0] * (1000 - count))])
        assert len(warnings(log)) == number


def test_a_long_absence_does_not_become_usual(log):
    train(hook_per_iteration(patience=50, momentum=0.5),
          [make_step(GOOD)] + [make_step(LOST)] * 50)
    assert len(warnings(log)) == 1
    assert '30.000% before' in warnings(log)[0]


def test_classes_that_the_source_lacks_are_no_loss(log):
    steps = [make_step([0, 1, 3], source=[0, 1]),
             *[make_step([0, 1, 1], source=[0, 1])] * 5]
    train(hook_per_iteration(patience=1, momentum=0.), steps)
    assert warnings(log) == []


def test_no_wait_for_the_device_between_intervals(log):
    class Watched(torch.Tensor):
        """A tensor that refuses to become a number."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func.__name__ not in (
                'item', 'tolist', '__bool__', '__int__', '__float__', 'cpu',
                'numpy', 'nonzero', 'bincount', 'masked_select'), func
            return super().__torch_function__(func, types, args, kwargs or {})

    step = make_step([0, 1], source=[0, 1])
    pseudo = step.pseudo_labels['target']
    for name in ('labels', 'weights', 'confidence'):
        setattr(pseudo, name, getattr(pseudo, name).as_subclass(Watched))
    view = step.views['source']
    view.labels = view.labels.as_subclass(Watched)
    scalars, _ = train(PseudoLabelHealthHook(
        interval=3, report_interval=3), [step] * 2)
    assert scalars == {}


@pytest.mark.parametrize('key, value', [
    ('report_interval', 75), ('vanish_ratio', 0.), ('patience', 0),
    ('momentum', 1.)])
def test_bad_arguments_name_their_key(key, value):
    with pytest.raises(ValueError, match=f'PseudoLabelHealthHook.{key}'):
        PseudoLabelHealthHook(**{key: value})


def test_unknown_pseudo_labels_are_named(log):
    with pytest.raises(ValueError, match=r"'night'.*\['target'\]"):
        train(PseudoLabelHealthHook(pseudo_label='night'), [])
