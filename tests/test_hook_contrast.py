"""Hooks of contrast: health of a head, banks filled before training."""

from __future__ import annotations

import copy
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import DataLoader

from datasets_common import (
    files_pipeline,
    folder,
    streets,
    write_folder,
)
from helpers import build, dacs_parts, tiny_student
from mmseg_contrast.engine.hooks import (
    ContrastHealthHook,
    PrototypeInitHook,
    contrast_health,
    prototype_init,
)
from mmseg_contrast.engine.hooks.contrast_health import class_cosines
from mmseg_contrast.engine.looking import untouched
from processes import on_ranks

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ['road', 'car', 'sky', 'train']


def head_config(bank='PrototypeBank', num_classes=4, channels=6, **options):
    bank = dict(type=bank) if isinstance(bank, str) else bank
    return dict(
        dict(type='ContrastHead', in_channels=8, in_index=1,
             num_classes=num_classes, channels=channels, bank=bank,
             projection=dict(layers=1)), **options)


def student(num_classes=4, **options):
    config = tiny_student(num_classes)
    config['auxiliary_head'] = head_config(num_classes=num_classes, **options)
    return config


def make_head(**options):
    torch.manual_seed(0)
    return MODELS.build(head_config(**options))


class Model(nn.Module):
    """Only what is asked of a model: a head."""

    def __init__(self, head):
        super().__init__()
        self.with_auxiliary_head = True
        self.auxiliary_head = head
        self.num_classes = head.num_classes


@pytest.fixture
def log(monkeypatch):
    lines = []

    def keep(text, logger=None, level=logging.INFO):
        lines.append((level, text))

    for module in (contrast_health, prototype_init):
        monkeypatch.setattr(module, 'print_log', keep)
    return lines


def warnings(log):
    return [text for level, text in log if level == logging.WARNING]


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()))


def slow_cosines(anchors, labels, centres, exists, leave_out=False):
    """Each anchor by itself."""
    rows = []
    for i, (anchor, c) in enumerate(zip(anchors, labels.tolist(),
                                        strict=True)):
        own = None
        if leave_out:
            rest = [j for j in range(len(anchors))
                    if labels[j] == c and j != i]
            if rest:
                own = cosine(anchor, anchors[rest].sum(0))
        elif exists[c]:
            own = cosine(anchor, centres[c])
        others = [cosine(anchor, centres[k]) for k in range(len(centres))
                  if k != c and exists[k]]
        rows.append((
            own is not None, own or 0., bool(others),
            sum(others) / max(len(others), 1), max(others, default=0.),
            own is not None and bool(others),
            own - max(others) if own is not None and others else 0.))
    return torch.tensor(rows).T


@pytest.mark.parametrize('exists', [
    [True] * 4, [True, False, True, False], [False] * 4,
    [True, False, False, False]])
def test_cosines_against_a_loop(exists):
    anchors, centres = unit(12, 6), 3 * unit(4, 6, seed=1)
    labels = torch.arange(12) % 4
    exists = torch.tensor(exists)
    torch.testing.assert_close(
        class_cosines(anchors, labels, centres, exists).float(),
        slow_cosines(anchors, labels, centres, exists))


def test_without_memory_an_anchor_is_not_its_own_centre():
    anchors = unit(9, 6)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
    number = torch.bincount(labels, minlength=4)
    centres = torch.zeros(4, 6).index_add_(0, labels, anchors)
    rows = class_cosines(anchors, labels, centres, number > 0, number == 1)
    torch.testing.assert_close(rows.float(), slow_cosines(
        anchors, labels, centres, number > 0, leave_out=True))
    assert rows[0].tolist() == [1.] * 8 + [0.]
    # a class of one would have a perfect cosine with itself
    assert rows[1, 8] == 0 and rows[6, 8] == 0


def train(head, hook, iterations, ages=None):
    """Let a hook watch anchors: a list of sets for each iteration."""
    scalars, hub = {}, {}
    runner = SimpleNamespace(
        model=Model(head), iter=0,
        train_dataloader=SimpleNamespace(
            dataset=SimpleNamespace(metainfo=dict(classes=CLASSES))),
        visualizer=SimpleNamespace(
            add_scalars=lambda d, step: scalars.update({step: d})),
        message_hub=SimpleNamespace(
            update_scalar=lambda k, v: hub.setdefault(k, []).append(v)))
    hook.before_train(runner)
    for runner.iter, sets in enumerate(iterations):
        hook.before_train_iter(runner, runner.iter)
        assert head.keep_anchors and head.last is None
        head.last = sets
        hook.after_train_iter(runner, runner.iter)
    hook.after_train(runner)
    assert not head.keep_anchors and head.last is None
    return scalars, hub


def anchors_of(vectors, labels):
    return dict(anchors=vectors, labels=torch.as_tensor(labels))


def per_iteration(**options):
    return ContrastHealthHook(interval=1, report_interval=1, **options)


def test_scalars_of_an_interval(log):
    head = make_head()
    head.bank.update(unit(30, 6, seed=3), torch.arange(30) % 3)
    head.bank.update(unit(4, 6, seed=4), torch.tensor([1, 1, 2, 2]))
    vectors, labels = 2 * unit(8, 6), torch.tensor(
        [0, 0, 1, 1, 1, 2, 255, 0])
    other = anchors_of(unit(3, 6, seed=5), [3, 255, -1])
    scalars, hub = train(
        head, ContrastHealthHook(interval=2, report_interval=2),
        [other, [anchors_of(vectors[:5], labels[:5]),
                 anchors_of(vectors[5:], labels[5:])], other])
    assert list(scalars) == [2]  # the third is in no full interval
    known = labels < 4
    rows = slow_cosines(vectors[known], labels[known],
                        head.bank.centres()[0], [True, True, True, False])
    directions = F.normalize(vectors[known].double(), dim=1)
    expected = {
        'positive_cosine': float(rows[1].mean()),
        'negative_cosine': float(rows[3].mean()),
        'nearest_cosine': float(rows[4].mean()),
        'margin': float((rows[1] - rows[4]).mean()),
        'spread': float(directions.std(0, unbiased=False).mean()),
        'anchor_coverage': 1.,  # class 3 was in the first iteration
        'bank_coverage': 0.75, 'max_age': 1., 'mean_age': 1 / 3}
    assert scalars[2] == {
        f'contrast/aux_{key}': pytest.approx(value, abs=1e-6)
        for key, value in expected.items()}
    assert hub == {
        f'train/contrast.aux.{key}': [pytest.approx(expected[key], abs=1e-6)]
        for key in ('margin', 'spread')}
    line = log[0][1]
    assert 'classes among anchors 4/4, in the bank 3, age at most 1' in line
    lowest = min((float((rows[1] - rows[4])[labels[known] == c].mean()), c)
                 for c in range(3))
    assert f'(lowest {CLASSES[lowest[1]]} {lowest[0]:.3f})' in line


def test_classes_are_counted_anew_in_each_interval(log):
    sets = [anchors_of(unit(len(c), 6), c) for c in (
        [0, 1], [2], [3, 255], [3], [], [255])]
    sets[4] = None
    scalars, _ = train(make_head(), ContrastHealthHook(
        interval=2, report_interval=2), sets)
    assert [scalars[n]['contrast/aux_anchor_coverage'] for n in (2, 4, 6)
            ] == [0.75, 0.25, 0.]


def test_a_report_is_the_mean_of_its_intervals(log):
    head = make_head()
    axes = torch.eye(6)
    head.bank.update(axes[:3], torch.arange(3))
    good = anchors_of(axes[:3], [0, 1, 2])  # margin 1
    bad = anchors_of(axes[[1, 2, 0]], [0, 1, 2])  # margin -1
    train(head, ContrastHealthHook(interval=1, report_interval=2),
          [good, good, good, bad, bad, bad])
    assert [float(text.split('margin ')[1].split(' ')[0])
            for level, text in log if level == logging.INFO] == [1., 0., -1.]


def test_a_bank_without_memory(log):
    head = make_head(bank='BatchBank')
    vectors, labels = unit(9, 6), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
    scalars, _ = train(head, per_iteration(), [anchors_of(vectors, labels)])
    centres = torch.zeros(4, 6).index_add_(0, labels, vectors)
    rows = slow_cosines(vectors, labels, centres, [True] * 4, leave_out=True)
    assert scalars[1]['contrast/aux_positive_cosine'] == pytest.approx(
        float(rows[1].sum() / 8), abs=1e-6)
    assert scalars[1]['contrast/aux_margin'] == pytest.approx(
        float(rows[6].sum() / 8), abs=1e-6)
    assert not any('age' in key and 'coverage' not in key or 'bank' in key
                   for key in scalars[1])


def test_nothing_to_say(log):
    head = make_head()
    scalars, hub = train(head, per_iteration(), [
        None, anchors_of(torch.zeros(0, 6), torch.zeros(0).long()),
        anchors_of(unit(2, 6), [255, 255])])
    for one in scalars.values():
        assert one == {'contrast/aux_anchor_coverage': 0.,
                       'contrast/aux_bank_coverage': 0.}
    assert hub == {} and warnings(log) == []
    assert 'no anchors in the last 1' in log[0][1]


def test_learnt_tokens_have_no_age(log):
    head = make_head(bank='PrototypeTokens')
    scalars, _ = train(head, per_iteration(), [
        anchors_of(unit(8, 6), torch.arange(8) % 4)])
    assert scalars[1]['contrast/aux_bank_coverage'] == 1.
    assert 'contrast/aux_max_age' not in scalars[1]


def seeing(head, *kinds):
    """Anchors that are good, turned or collapsed, with a full bank."""
    axes = torch.eye(6)[:4]
    head.bank.update(axes, torch.arange(4))
    sets = dict(good=axes, turned=axes[[1, 2, 3, 0]],
                collapsed=axes[[0, 0, 0, 0]])
    return [anchors_of(sets[kind], [0, 1, 2, 3]) for kind in kinds]


def test_a_margin_of_nothing_is_warned_of_once_until_it_recovers(log):
    def run(*kinds):
        log.clear()
        head = make_head(tau=100.)
        train(head, per_iteration(patience=2), seeing(head, *kinds))
        return warnings(log)

    assert run('good', 'turned', 'good', 'turned', 'good') == []
    once = run('good', *['turned'] * 5)
    assert len(once) == 1
    assert once[0].startswith(
        "Contrast of 'aux' separates nothing: anchors have a cosine of 0.000 "
        'with their own class and of 1.000 with the nearest other one '
        '(2 reports in a row)')
    assert '100 now' in once[0]
    assert len(run(*['turned'] * 3, 'good', *['turned'] * 3)) == 2


def test_a_collapse_is_warned_of(log):
    head = make_head()
    train(head, per_iteration(patience=9),
          seeing(head, 'good', 'collapsed', 'collapsed'))
    assert len(warnings(log)) == 1
    assert "of 'aux' have collapsed" in warnings(log)[0]
    log.clear()  # random directions have 1 / sqrt(D)
    scalars, _ = train(make_head(), per_iteration(), [
        anchors_of(unit(4000, 6), torch.arange(4000) % 4)])
    assert scalars[1]['contrast/aux_spread'] == pytest.approx(
        6**-0.5, rel=0.02)
    assert not any('collapsed' in text for text in warnings(log))


def test_old_and_missing_classes_are_named(log):
    head = make_head()
    axes = torch.eye(6)
    head.bank.update(axes[:2], torch.tensor([0, 1]))
    for _ in range(4):
        head.bank.update(axes[:1], torch.tensor([0]))
    assert head.bank.age.tolist() == [0, 4, -1, -1]
    sets = [anchors_of(axes[:3], [0, 1, 2])] * 3
    train(head, per_iteration(max_age=4), sets)
    assert len(warnings(log)) == 1
    assert "Class 'sky' is among the anchors of 'aux', but not" in (
        warnings(log)[0])
    log.clear()
    train(head, per_iteration(max_age=3), sets)
    assert len(warnings(log)) == 2
    assert "Class 'car' in the bank of 'aux' has not been updated for 4" in (
        warnings(log)[1])


def test_no_wait_for_the_device_between_intervals(log):
    class Watched(torch.Tensor):
        """A tensor that refuses to become a number."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func.__name__ not in (
                'item', 'tolist', '__bool__', '__int__', '__float__', 'cpu',
                'numpy', 'nonzero', 'bincount', 'masked_select', 'unique',
            ), func
            return super().__torch_function__(func, types, args, kwargs or {})

    head = make_head()
    anchors = dict(anchors=unit(3, 6).as_subclass(Watched),
                   labels=torch.tensor([0, 1, 255]).as_subclass(Watched))
    scalars, _ = train(head, ContrastHealthHook(
        interval=3, report_interval=3), [anchors] * 2)
    assert scalars == {}


@pytest.mark.parametrize('key, value', [
    ('report_interval', 75), ('patience', 0), ('max_age', 0),
    ('min_margin', -1.), ('min_spread', 1.), ('heads', 'aux')])
def test_bad_arguments_of_health_name_their_key(key, value):
    with pytest.raises(ValueError, match=f'ContrastHealthHook.{key}'):
        ContrastHealthHook(**{key: value})


def test_unknown_heads_are_named(log):
    with pytest.raises(ValueError, match=r"'aux_3'.*\['aux'\]"):
        train(make_head(), ContrastHealthHook(heads=['aux_3']), [])
    stock = MODELS.build(tiny_student())
    with pytest.raises(ValueError, match='no ContrastHead'):
        ContrastHealthHook().before_train(SimpleNamespace(model=stock))


# -- banks filled before training ------------------------------------------


def stream_config(count=5, workers=0, **options):
    crop = dict(type='RandomCrop', crop_size=(32, 32))
    return dict(
        batch_size=2, num_workers=workers,
        dataset=dict(type='StreamDataset', seed=7, streams=dict(
            source=dict(dataset=streets('source', count, crop), **options),
            target=dict(dataset=streets('target', 4, crop, labels=False),
                        labelled=False))))


def make_runner(model, loader=None, iteration=0):
    loader = loader or stream_config()
    dataset = DATASETS.build(loader['dataset'])
    return SimpleNamespace(
        model=model, iter=iteration, seed=3,
        train_dataloader=DataLoader(
            dataset, batch_size=loader['batch_size'],
            num_workers=loader['num_workers']))


def adapting(bank='PrototypeBank', **options):
    """DACS with contrast on ten classes, its statistics not those of birth."""
    parts = dacs_parts()
    parts['objectives']['contrast'] = dict(type='Contrast')
    model = build(student(10, bank=bank, **options), **parts)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.running_mean.uniform_(-.5, .5)
                part.running_var.uniform_(.5, 2)
    return model


def source_pixels(model, runner, count=5, correct_only=False):
    """Embeddings and labels of all source images, one after the other."""
    dataset = runner.train_dataloader.dataset
    net = model.segmentor
    vectors, ids = [], []
    with untouched(model):
        for position in range(count):
            drawn = dataset[position]
            data = model.data_preprocessor(dict(
                inputs=dict(source=[drawn['inputs']['source']]),
                data_samples=dict(
                    source=[drawn['data_samples']['source']])), True)
            images = data['inputs']['source']
            labels = data['data_samples']['source'][0].gt_sem_seg.data.long()
            features = net.extract_feat(images)
            maps = net.auxiliary_head.project(features)
            labels = labels[:, ::4, ::4]
            if correct_only:
                scores = F.interpolate(
                    net.decode_head(features), images.shape[2:],
                    mode='bilinear')
                scores = F.interpolate(scores.softmax(1), maps.shape[2:],
                                       mode='bilinear')
                labels = labels.where(scores.argmax(1) == labels, 255)
            vectors.append(maps.permute(0, 2, 3, 1).flatten(0, 2))
            ids.append(labels.flatten())
    return torch.cat(vectors).double(), torch.cat(ids)


@pytest.mark.parametrize('options', [
    {}, dict(correct_only=True), dict(max_samples=3), dict(batch_size=3),
    dict(num_workers=1)], ids=str)
def test_the_bank_holds_the_mean_of_the_whole_source(log, options):
    model = adapting(dict(type='PrototypeBank', clock='ema', new_weight=0.1))
    runner = make_runner(model)
    vectors, ids = source_pixels(
        model, runner, options.get('max_samples', 5),
        options.get('correct_only', False))
    PrototypeInitHook(**options).before_train(runner)
    bank = model.segmentor.auxiliary_head.bank
    for c in range(10):
        mine = vectors[ids == c]
        assert int(bank.count[c, 0]) == len(mine)
        if len(mine):
            torch.testing.assert_close(
                bank.mean[c, 0].double(), mine.mean(0), rtol=0, atol=1e-6)
    held = bank.count[:, 0] > 0
    assert 0 < held.sum()
    assert bank.age.tolist() == [0 if one else -1 for one in held]
    assert bank.clock == 'ema'
    number = options.get('max_samples', 5)
    assert log[0][1] == f'PrototypeInitHook: {number} images for aux'
    assert f'the bank of aux holds {int(held.sum())} of 10' in log[1][1]


@pytest.mark.parametrize('bank, extra', [
    (dict(type='GaussianBank'), {}),
    (dict(type='PixelQueue', length=50, number=3), {}),
    (dict(type='SegmentQueue', length=50), {}),
    ('PrototypeBank', dict(
        features='decoder', sampler=dict(type='AllPixels')))], ids=str)
def test_other_banks_and_features(log, bank, extra):
    model = adapting(bank, **extra)
    PrototypeInitHook().before_train(make_runner(model))
    centres, held = model.segmentor.auxiliary_head.bank.centres()
    assert held.sum() >= 3 and centres.isfinite().all()


def everything(model):
    return {**{k: v.clone() for k, v in model.state_dict().items()
               if '.bank.' not in k},
            'modes': [part.training for part in model.modules()]}


def test_nothing_but_the_bank_changes(log):
    model = adapting()
    model.segmentor.backbone.layers[0][1].eval()  # a frozen norm stays so
    runner = make_runner(model)
    before = everything(model)
    draws = [runner.train_dataloader.dataset[i] for i in range(3)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(),
              random.getstate())
    PrototypeInitHook().before_train(runner)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    after = everything(model)
    assert before.pop('modes') == after.pop('modes')
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert runner.train_dataloader.dataset.seed == 7
    for i, drawn in enumerate(draws):
        again = runner.train_dataloader.dataset[i]
        for name in ('source', 'target'):
            assert torch.equal(again['inputs'][name], drawn['inputs'][name])
    assert all(part.grad is None for part in model.parameters())


def test_skipped_where_the_bank_is_there(log):
    model = adapting()
    PrototypeInitHook().before_train(make_runner(model, iteration=40))
    bank = model.segmentor.auxiliary_head.bank
    assert bank.count.sum() == 0
    assert 'the run resumes at iteration 40' in log[0][1]
    log.clear()
    bank.update(unit(2, 6), torch.tensor([3, 4]))
    PrototypeInitHook().before_train(make_runner(model))
    assert bank.count.sum() == 2
    assert 'skipped aux, its PrototypeBank came with the checkpoint and ' \
        'holds 2 of 10 classes' in log[0][1]
    for kind in ('BatchBank', 'PrototypeTokens'):
        log.clear()
        PrototypeInitHook().before_train(make_runner(adapting(kind)))
        assert log == [(logging.INFO, 'PrototypeInitHook: skipped aux, a '
                        f'{kind} takes in no vectors')]


def test_the_teacher_is_asked_if_it_was_loaded(log):
    def mean(loaded, use):
        model = adapting()
        with torch.no_grad():  # a teacher that is not the student
            for part in model.teachers['ema'].model.parameters():
                part.mul_(0.5).add_(0.01)
        hook = PrototypeInitHook(use=use)
        if loaded:
            hook.after_load_checkpoint(None, {})
        hook.before_train(make_runner(model))
        return model.segmentor.auxiliary_head.bank.mean

    own = mean(False, 'student')
    assert torch.equal(mean(False, 'teacher'), own)
    assert any('copy of the student' in text for _, text in log)
    assert torch.equal(mean(True, 'student'), own)
    assert not torch.allclose(mean(True, 'teacher'), own, atol=1e-3)


def test_a_plain_config(log, tmp_path):
    root = write_folder(tmp_path / 'a', 3, size=(32, 32))
    torch.manual_seed(0)
    model = MODELS.build(student(3)).train()
    loader = dict(batch_size=2, num_workers=0, dataset=folder(
        root, files_pipeline(dict(type='RandomFlip', prob=0.5))))
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    PrototypeInitHook().before_train(make_runner(model, loader))
    assert (np.random.get_state()[1] == state).all()
    bank = model.auxiliary_head.bank
    assert int(bank.count.sum()) == 3 * 64
    assert model.training


@pytest.mark.parametrize('key, value', [
    ('use', 'both'), ('max_samples', 0), ('batch_size', 0),
    ('num_workers', -1)])
def test_bad_arguments_of_init_name_their_key(key, value):
    with pytest.raises(ValueError, match=f'PrototypeInitHook.{key}'):
        PrototypeInitHook(**{key: value})


@pytest.mark.parametrize('options, words', [
    (dict(view='target'), r"'target'.*\['source'\]"),
    (dict(view='night'), r"'night'.*\['source'\]"),
    (dict(head='aux_1'), r"'aux_1'.*\['aux'\]"),
    (dict(use='teacher', teacher='mean'), r"'mean'.*\['ema'\]")])
def test_mistakes_of_init_are_named(log, options, words):
    with pytest.raises(ValueError, match=words):
        PrototypeInitHook(**options).before_train(make_runner(adapting()))


def health_and_banks_of_a_rank(folder):
    rank = get_rank()
    model = adapting(dict(type='PrototypeBank', clock='ema', new_weight=0.1))
    queue = adapting(dict(type='SegmentQueue', length=50))
    for one in (model, queue):
        PrototypeInitHook().before_train(make_runner(one))
    bank = model.segmentor.auxiliary_head.bank

    head = make_head()
    head.bank.update(torch.eye(6)[:3], torch.arange(3))
    vectors, labels = unit(9, 6), torch.arange(9) % 4
    mine = anchors_of(vectors[:2], labels[:2]) if rank else (
        anchors_of(vectors[2:], labels[2:]))
    hook = per_iteration()
    alone = make_head(bank='BatchBank')
    torch.save(dict(
        count=bank.count, mean=bank.mean,
        queue=queue.segmentor.auxiliary_head.bank.state_dict(),
        scalars=train(head, hook, [mine, None if rank else mine])[0],
        batch=train(alone, hook, [mine])[0],
    ), folder / f'rank{rank}.pth')


def test_two_ranks_are_one(log, tmp_path):
    on_ranks(health_and_banks_of_a_rank, tmp_path)
    ranks = [torch.load(tmp_path / f'rank{r}.pth', weights_only=True)
             for r in range(2)]
    # five images on two ranks: one takes a repeated one that doesn't count
    model = adapting(dict(type='PrototypeBank', clock='ema', new_weight=0.1))
    queue = adapting(dict(type='SegmentQueue', length=50))
    for one in (model, queue):
        PrototypeInitHook().before_train(make_runner(one))
    bank = model.segmentor.auxiliary_head.bank
    segments = queue.segmentor.auxiliary_head.bank
    for rank in ranks:
        assert torch.equal(rank['count'], bank.count)
        torch.testing.assert_close(rank['mean'], bank.mean)
        assert torch.equal(rank['queue']['filled'], segments.filled)
    for key, value in ranks[0]['queue'].items():
        assert torch.equal(ranks[1]['queue'][key], value), key
    head = make_head()
    head.bank.update(torch.eye(6)[:3], torch.arange(3))
    vectors, labels = unit(9, 6), torch.arange(9) % 4
    scalars, _ = train(head, per_iteration(), [anchors_of(vectors, labels)])
    batch, _ = train(make_head(bank='BatchBank'), per_iteration(),
                     [anchors_of(vectors, labels)])
    for rank in ranks:
        assert rank['scalars'][1] == pytest.approx(scalars[1], abs=1e-6)
        assert rank['scalars'][2]['contrast/aux_anchor_coverage'] == 1.
        assert rank['batch'][1] == pytest.approx(batch[1], abs=1e-6)


# -- a real run ------------------------------------------------------------


def tiny_run(tmp_path, name, hooks, **changes):
    config = Config.fromfile(str(ROOT / 'configs/quickstart/uda.py'))
    net = student(10)
    config.model.segmentor = net
    config.data_preprocessor = net['data_preprocessor']
    config.merge_from_dict({
        'model.objectives.contrast': dict(type='Contrast'),
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 100,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 1, 'log_processor.window_size': 1,
        'randomness': dict(seed=3), **changes})
    loader = config.train_dataloader
    loader.batch_size, loader.num_workers = 2, 0
    loader.persistent_workers = False
    loader.dataset = stream_config()['dataset']
    config.custom_hooks = [dict(type='PositionHook'), *hooks]
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    config.work_dir = str(tmp_path / name)
    config.experiment_name = f'{tmp_path.name}_{name}'
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def losses(runner):
    logged = runner.message_hub.log_scalars
    return {key: list(value.data[0]) for key, value in logged.items()
            if 'loss' in key}


def test_training_with_all_three_hooks(tmp_path):
    watching = [
        dict(type='ContrastHealthHook', interval=2, report_interval=4),
        dict(type='FeatureSpaceHook', interval=2, pixels=200)]
    plain = losses(tiny_run(tmp_path, 'plain', []))
    watched = tiny_run(tmp_path, 'watched', watching)
    # to watch changes nothing
    mine = losses(watched)
    assert mine.keys() == plain.keys()
    assert all(mine[key] == plain[key] for key in plain)
    margin = watched.message_hub.get_scalar('train/contrast.aux.margin')
    assert len(margin.data[0]) == 2 and math.isfinite(margin.data[0][-1])
    pictures = sorted(
        one.name for one in (tmp_path / 'watched').rglob('iter_*.png'))
    assert pictures[:2] == ['iter_000002.png', 'iter_000004.png']

    filled = tiny_run(tmp_path, 'filled', [
        dict(type='PrototypeInitHook'), *watching])
    mine = losses(filled)
    assert mine['train/source.decode.loss_ce'][0] == (
        plain['train/source.decode.loss_ce'][0])  # the same first batch
    assert mine['train/contrast.loss_source'][0] != (
        plain['train/contrast.loss_source'][0])
    bank = filled.model.segmentor.auxiliary_head.bank
    more = bank.count.sum() - watched.model.segmentor.auxiliary_head.bank \
        .count.sum()
    assert more > 0
    # resumed: the bank comes from the checkpoint and is not filled again
    whole = tiny_run(tmp_path, 'resumed', [
        dict(type='PrototypeInitHook'), *watching], **{
            'resume': True,
            'load_from': str(tmp_path / 'filled' / 'iter_2.pth')})
    again = losses(whole)
    for key, values in again.items():
        assert values[-2:] == mine[key][-2:], key
    other = whole.model.segmentor.auxiliary_head.bank
    assert torch.equal(other.count, bank.count)
    assert torch.equal(other.mean, bank.mean)


def test_a_copy_of_a_watched_model_can_be_made(log):
    head = make_head()
    train(head, per_iteration(), [anchors_of(unit(3, 6), [0, 1, 2])])
    copy.deepcopy(head)
