"""Banks: statistics, queues, ranks, checkpoints."""

import itertools
import math
from collections import deque
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner.checkpoint import load_state_dict
from mmseg.registry import MODELS
from torch import nn

from mmseg_contrast import ops

ABSENT = -math.inf
CLASSES, WIDTH = 4, 3
SIZES = dict(num_classes=CLASSES, channels=WIDTH)
KINDS = dict(
    cumulative=dict(type='PrototypeBank'),
    ema=dict(type='PrototypeBank', clock='ema', new_weight=.3),
    several=dict(type='PrototypeBank', prototypes=3, clock='ema',
                 new_weight=.3),
    gaussian=dict(type='GaussianBank'),
    gaussian_ema=dict(type='GaussianBank', clock='ema', new_weight=.3),
    pixels=dict(type='PixelQueue', length=5, number=2),
    images=dict(type='SegmentQueue', length=3),
    batches=dict(type='SegmentQueue', length=3, segment='batch',
                 normalize=False, energy='mean'))
TRANSPORT = dict(type='PrototypeBank', prototypes=3, assign='transport',
                 compare='prototype', distance_weight=.1)


def build(kind='cumulative', double=True, **changes):
    bank = MODELS.build({**SIZES, **KINDS[kind], **changes})
    return bank.double() if double else bank


def draw(count, seed=0, present=range(CLASSES)):
    """Vectors, labels (some ignored), scores and images of a batch."""
    gen = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, WIDTH, generator=gen).double()
    choice = torch.tensor([*present, 255])
    labels = choice[torch.randint(len(choice), (count, ), generator=gen)]
    scores = torch.rand(count, generator=gen)
    images = torch.randint(0, 2, (count, ), generator=gen)
    return vectors, labels, scores, images, 2


def state(bank):
    return {name: one.clone() for name, one in bank.state_dict().items()}


def knowledge(bank):
    """The state without the age, which grows with every update."""
    known = state(bank)
    del known['age']
    return known


# Statistics


@pytest.mark.parametrize('kind', ['cumulative', 'gaussian'])
def test_a_cumulative_bank_equals_two_passes_over_everything(kind):
    bank = build(kind)
    batches = [draw(n, seed) for seed, n in enumerate((9, 1, 0, 40, 3))]
    for batch in batches:
        bank.update(*batch)
    vectors = torch.cat([one[0] for one in batches])
    labels = torch.cat([one[1] for one in batches])
    for c in range(CLASSES):
        mine = vectors[labels == c]
        assert bank.count.view(-1)[c] == len(mine)
        torch.testing.assert_close(
            bank.mean.view(CLASSES, WIDTH)[c], mine.mean(0))
        if kind == 'gaussian':
            torch.testing.assert_close(
                bank.variance[c], mine.var(0, correction=0))
    assert bank.count.dtype == torch.int64


def test_the_new_weight_is_that_of_the_new_batch():
    bank = build('ema')
    labels = torch.zeros(2).long()
    bank.update(torch.tensor([[1., 2., 3.], [3., 2., 1.]]), labels)
    assert bank.mean[0, 0].tolist() == [2, 2, 2]  # as it is, not 0.3 of it
    bank.update(torch.zeros(2, 3) + 12, labels)
    torch.testing.assert_close(
        bank.mean[0, 0], torch.full((3, ), .7 * 2 + .3 * 12).double())
    latest = MODELS.build(dict(type='PrototypeBank', clock='batch', **SIZES))
    latest.update(torch.ones(1, 3), labels[:1])
    latest.update(torch.zeros(1, 3) + 5, labels[:1])
    assert latest.mean[0, 0].tolist() == [5, 5, 5]


def test_a_moving_gaussian_is_that_of_the_mixture():
    bank = build('gaussian_ema')
    gen = torch.Generator().manual_seed(0)
    old = torch.randn(50, WIDTH, generator=gen).double()
    new = torch.randn(20, WIDTH, generator=gen).double() * 3 + 1
    for vectors in (old, new):
        bank.update(vectors, torch.zeros(len(vectors)).long())
    # Every old vector weighs 0.7 / 50, every new one 0.3 / 20.
    weight = torch.cat([torch.full((50, ), .7 / 50),
                        torch.full((20, ), .3 / 20)]).double().unsqueeze(1)
    every = torch.cat([old, new])
    mean = (weight * every).sum(0)
    torch.testing.assert_close(bank.mean[0], mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        bank.variance[0], (weight * (every - mean)**2).sum(0), rtol=0,
        atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_an_absent_class_is_not_touched(kind):
    bank = build(kind)
    bank.update(*draw(60, 0))
    before = knowledge(bank)
    bank.update(*draw(60, 1, present=(0, 1, 3)))
    for name, tensor in knowledge(bank).items():
        assert torch.equal(before[name][2], tensor[2]), name
    changed = 'keys' if 'keys' in before else 'mean'
    assert not torch.equal(before[changed][1], bank.state_dict()[changed][1])
    # Nor is any by a batch without a label, or without a vector.
    before = knowledge(bank)
    vectors, _, scores, images, number = draw(7, 2)
    bank.update(vectors, torch.full((7, ), 255), scores, images, number)
    bank.update(*draw(0))
    for name, tensor in knowledge(bank).items():
        assert torch.equal(before[name], tensor), name
    assert bank.age.tolist() == [2, 2, 3, 2]


@pytest.mark.parametrize('kind', KINDS)
def test_the_age_counts_updates_since_a_class_was_there(kind):
    bank = build(kind)
    assert bank.age.tolist() == [-1] * CLASSES
    ages = []
    for present in ((0, 1), (1, 3), (1, ), (0, ), ()):
        vectors, _, scores, images, number = draw(40, 1)
        labels = torch.tensor([*present, 255])[
            torch.arange(40) % (len(present) + 1)]
        bank.update(vectors, labels, scores, images, number)
        ages.append(bank.age.tolist())
    assert ages == [[0, 0, -1, -1], [1, 0, -1, 0], [2, 0, -1, 1],
                    [0, 1, -1, 2], [1, 2, -1, 3]]
    assert bank.age.dtype == torch.int64 and 'age' in bank.state_dict()


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_a_checkpoint_without_an_age_can_be_loaded(kind, strict):
    model = nn.Module()
    model.bank = build(kind)
    model.bank.update(*draw(60, 1, present=(0, 1, 3)))
    old = model.state_dict()
    del old['bank.age']
    fresh = nn.Module()
    fresh.bank = build(kind)
    load_state_dict(fresh, old, strict=strict)
    assert fresh.bank.age.tolist() == [0, 0, -1, 0]
    # A checkpoint without the bank is none of a bank without an age.
    fresh.bank.age.fill_(7)
    load_state_dict(fresh, {}, strict=False)
    assert fresh.bank.age.tolist() == [7] * CLASSES


def test_what_does_not_remember_has_no_age():
    for config in (dict(type='BatchBank'), dict(type='PrototypeTokens')):
        bank = MODELS.build({**SIZES, **config})
        bank.update(*draw(9))
        assert bank.age.eq(-1).all() and 'age' not in bank.state_dict()
        nn.Module.load_state_dict(bank, bank.state_dict(), strict=True)


@pytest.mark.parametrize('kind', [*KINDS, 'half', 'tokens', 'batch'])
def test_centres_are_the_mean_key_of_each_class(kind):
    config = KINDS.get(kind) or dict(
        half=dict(type='PixelQueue', length=5, number=2, dtype='float16'),
        tokens=dict(type='PrototypeTokens', prototypes=2),
        batch=dict(type='BatchBank'))[kind]
    bank = MODELS.build({**SIZES, **config})
    for seed in range(3):
        bank.update(*draw(40, seed, present=(0, 1, 3)))
    if hasattr(bank, 'keys'):  # what an empty place holds must not matter
        bank.keys[~bank.stored()[1]] = 99
    centres, there = bank.centres()
    assert centres.dtype == torch.float32 and not centres.requires_grad
    assert centres.shape == (CLASSES, WIDTH)
    if kind in ('tokens', 'batch'):
        assert there.tolist() == [kind == 'tokens'] * CLASSES
    else:
        assert there.tolist() == [True, True, False, True]
    assert centres[~there].eq(0).all()
    for c in there.nonzero().flatten().tolist():
        if hasattr(bank, 'keys'):
            want = bank.keys[c][bank.stored()[1][c]].float().mean(0)
        elif kind == 'tokens':
            want = F.normalize(bank.tokens[c], dim=1).mean(0)
        elif kind == 'several':
            n = bank.count[c].float()
            assert n.unique().numel() > 1
            want = (n @ bank.mean[c]) / n.sum()
        else:
            want = bank.mean.view(CLASSES, WIDTH)[c]
        torch.testing.assert_close(centres[c], want.detach())
    if kind in ('cumulative', 'several', 'gaussian'):
        # They are no view of the state.
        centres.zero_()
        assert bank.mean.abs().sum() > 0


@pytest.mark.parametrize('kind', KINDS)
def test_an_unseen_class_has_no_energy(kind):
    bank = build(kind)
    anchors, labels, *_ = draw(9, 5)
    labels[:2] = 2
    assert bank.energies(anchors, .1).eq(ABSENT).all()
    assert bank.positives(anchors, labels, .1).eq(ABSENT).all()
    anchors.requires_grad_()
    empty = bank.loss(anchors, labels, .1, 'positive')
    grad, = torch.autograd.grad(empty, anchors)
    assert empty == 0 and grad.eq(0).all()
    bank.update(*draw(60, 1, present=(0, 1, 3)))
    energies = bank.energies(anchors, .1)
    assert energies[:, 2].eq(ABSENT).all()
    assert energies[:, [0, 1, 3]].isfinite().all()
    grad, = torch.autograd.grad(
        bank.loss(anchors, labels, .1, 'positive'), anchors)
    assert grad[:2].eq(0).all() and grad.abs().sum() > 0


@pytest.mark.parametrize('own', ['energy', 'positive'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_that_of_energies_and_positives(kind, own):
    bank = build(kind)
    bank.update(*draw(60, 1))
    bank.update(*draw(60, 2, present=(0, 1, 3)))
    anchors, labels, weights, *_ = draw(9, 5)
    anchors.requires_grad_()
    weights = weights.double().requires_grad_()
    for reduce in ('mean', 'lse'):
        got = bank.loss(anchors, labels, .2, own, .1, reduce, weights)
        want = 2 * ops.contrast_loss(
            bank.energies(anchors, .2), bank.positives(anchors, labels, .2),
            labels, own, reduce_positives=reduce, anchor_weights=weights)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(got, (anchors, weights)),
                        torch.autograd.grad(want, (anchors, weights)),
                        strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_gaussian_bank_is_a_distribution_contrast():
    bank = build('gaussian')
    bank.update(*draw(60, 1))
    anchors, labels, *_ = draw(9, 5)
    got = bank.loss(anchors, labels, .5, 'energy')
    known = labels != 255
    f, y = anchors[known], labels[known]
    energies = f @ bank.mean.T / .5 + f**2 @ bank.variance.T / .5**2 / 2
    own = (f * bank.mean[y]).sum(1) / .5
    torch.testing.assert_close(got, (energies.logsumexp(1) - own).mean())
    # Without a variance it is the cross entropy with prototypes.
    bank.variance.zero_()
    torch.testing.assert_close(
        bank.loss(anchors, labels, .5, 'energy'),
        F.cross_entropy(f @ bank.mean.T / .5, y))


def test_what_a_gaussian_is_scaled_by():
    bank = build('gaussian')
    bank.update(*draw(60, 1))
    length = bank.mean.norm(dim=1, keepdim=True)
    for how, mean, variance in (
            ('none', bank.mean, bank.variance),
            ('mean', bank.mean / length, bank.variance / length**2),
            ('rows', bank.mean / length, bank.variance / bank.variance.norm(
                dim=1, keepdim=True))):
        bank.normalize = how
        for got, want in zip(
                bank.statistics(), (mean, variance), strict=True):
            torch.testing.assert_close(got, want)
    # 'mean' is the statistics of the keys divided by that length.
    bank.normalize = 'mean'
    vectors, labels, *_ = draw(60, 1)
    mine = vectors[labels == 1] / length[1]
    torch.testing.assert_close(
        bank.statistics()[1][1], mine.var(0, correction=0))
    scaled = build('cumulative', normalize=True)
    scaled.update(vectors, labels)
    torch.testing.assert_close(
        scaled.energies(vectors, .1), vectors @ F.normalize(
            scaled.mean[:, 0], dim=1).T / .1)


def test_several_prototypes_take_the_nearest_vectors():
    bank = build('several', new_weight=1.)
    start = F.normalize(bank.mean, dim=2)
    vectors, labels, *_ = draw(60, 1)
    nearest = [(start[y] @ f).argmax().item() if y < 255 else None
               for f, y in zip(vectors, labels.tolist(), strict=True)]
    bank.update(vectors, labels)
    for c, k in itertools.product(range(CLASSES), range(3)):
        mine = vectors[[n == k and y == c for n, y in zip(
            nearest, labels.tolist(), strict=True)]]
        assert bank.count[c, k] == len(mine)
        if len(mine):
            torch.testing.assert_close(bank.mean[c, k], mine.mean(0))
    bank.count[1, 0] = 0  # as if not yet seen
    energies = bank.energies(vectors, .5)
    seen = bank.count[1] > 0
    assert 0 < seen.sum() < 3
    torch.testing.assert_close(energies[:, 1], (
        vectors @ bank.mean[1][seen].T / .5).logsumexp(1))


def test_many_prototypes_are_not_taken_for_the_ignored_label():
    # Class 85 of 100 with 3 prototypes each has number 255.
    bank = MODELS.build(dict(type='PrototypeBank', num_classes=100,
                             channels=WIDTH, prototypes=3))
    vectors = draw(50)[0].float()
    bank.update(vectors, torch.full((50, ), 85))
    assert bank.count[85].sum() == 50 and bank.count[85].ne(0).all()
    queue = MODELS.build(dict(type='SegmentQueue', num_classes=100,
                              channels=WIDTH, length=3))
    queue.update(vectors, torch.full((50, ), 85),
                 images=torch.arange(50) % 3, num_images=3)
    assert queue.filled[85] == 3 and queue.filled.sum() == 3


def slow_transport(similarities, steps=3, epsilon=.05):
    """Shares of the vectors of one class, as published."""
    q = (similarities / epsilon).exp().T
    q = q / q.sum()
    for _ in range(steps):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize('steps, epsilon', [(3, .05), (1, .2)])
def test_transport_equals_the_loop_over_classes(steps, epsilon):
    _, labels, *_ = draw(50, 3, present=(0, 1, 3))
    labels = labels.where(labels != 255, torch.tensor(CLASSES))
    gen = torch.Generator().manual_seed(0)
    similarities = torch.rand(50, 3, generator=gen).double() * 2 - 1
    got = ops.class_sinkhorn(similarities, labels, CLASSES, steps, epsilon)
    for c in range(CLASSES + 1):
        mine = labels == c
        torch.testing.assert_close(got[mine], slow_transport(
            similarities[mine], steps, epsilon))
    assert (labels == 2).sum() == 0


def test_transport_uses_all_prototypes_equally():
    # All are nearest to the first.
    similarities = torch.rand(90, 3, generator=torch.Generator().manual_seed(
        0)) * .2 + torch.tensor([.7, 0., -.3])
    labels = torch.zeros(90).long()
    for epsilon in (.05, .005):  # exp(1 / 0.005) is no float32
        shares = ops.class_sinkhorn(similarities, labels, 1, 50, epsilon)
        torch.testing.assert_close(shares.sum(1), torch.ones(90))
        torch.testing.assert_close(
            shares.sum(0), torch.full((3, ), 30.), rtol=.02, atol=0)
    assert similarities.argmax(1).eq(0).all()
    # What must get nothing gets nothing, also where it is all there is.
    similarities[:, 1] = ABSENT
    similarities[0] = ABSENT
    shares = ops.class_sinkhorn(similarities, labels, 1)
    assert shares.isfinite().all() and shares[:, 1].eq(0).all()
    assert shares[0].eq(0).all()
    torch.testing.assert_close(shares[1:].sum(1), torch.ones(89))
    assert ops.class_sinkhorn(
        similarities[:0], labels[:0], 1).shape == (0, 3)


def test_transported_vectors_move_the_prototypes():
    bank = build('several', new_weight=1., assign='transport')
    start = F.normalize(bank.mean, dim=2)
    vectors, labels, *_ = draw(60, 1)
    got = bank.assigned(vectors, labels)
    bank.update(vectors, labels)
    moved = 0
    for c in range(CLASSES):
        mine = (labels == c).nonzero().flatten()
        cosines = F.normalize(vectors[mine], dim=1) @ start[c].T
        chosen = slow_transport(cosines).argmax(1)
        moved += (chosen != cosines.argmax(1)).sum().item()
        assert got[mine].tolist() == (3 * c + chosen).tolist()
        for k in range(3):
            assert bank.count[c, k] == (chosen == k).sum()
            if (chosen == k).any():
                torch.testing.assert_close(
                    bank.mean[c, k], vectors[mine[chosen == k]].mean(0))
    assert moved > 3 and got[labels == 255].eq(-1).all()


@pytest.mark.parametrize('assign', ['nearest', 'transport'])
@pytest.mark.parametrize('distance_weight', [0., .1])
def test_each_prototype_is_a_class_of_its_own(assign, distance_weight):
    # ProtoSeg: cross entropy of all prototypes, and (1 - s)^2.
    bank = build('several', normalize=True, compare='prototype',
                 assign=assign, distance_weight=distance_weight)
    for seed in range(3):
        bank.update(*draw(60, seed, present=(0, 1, 3)))
    bank.count[1, 0] = 0  # as if not yet seen
    anchors, labels, weights, *_ = draw(30, 5)
    anchors = F.normalize(anchors, dim=1).requires_grad_()
    weights = weights.double()
    got = bank.loss(anchors, labels, .1, 'energy', .05,
                    anchor_weights=weights)
    mean = F.normalize(bank.mean, dim=2)
    seen = bank.count.flatten() > 0
    targets = {}
    for c in (0, 1, 3):
        mine = (labels == c).nonzero().flatten()
        cosines = anchors[mine].detach() @ mean[c].T
        there = bank.count[c] > 0
        cosines = cosines[:, there]
        if assign == 'transport':
            cosines = slow_transport(cosines)
        places = there.nonzero().flatten()[cosines.argmax(1)]
        targets |= dict(zip(
            mine.tolist(), (3 * c + places).tolist(), strict=True))
    total = 0.
    for i, target in targets.items():
        s = mean.flatten(0, 1) @ anchors[i]
        total = total + weights[i] * (
            2 * ((s[seen] / .1).logsumexp(0) - s[target] / .1)
            + distance_weight * (1 - s[target])**2)
    want = total / len(targets)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(one, anchors)[0] for one in (got, want)]
    torch.testing.assert_close(*grads)
    assert grads[0][labels == 2].eq(0).all()
    plain = build('several', compare='prototype', normalize=True,
                  assign=assign, distance_weight=distance_weight)
    empty = plain.loss(anchors, labels, .1, 'energy')
    grad, = torch.autograd.grad(empty, anchors)
    assert empty == 0 and grad.eq(0).all()
    bank.distance_weight = 0.
    assert got - bank.loss(anchors, labels, .1, 'positive', .05,
                           anchor_weights=weights) >= distance_weight * .01


def test_one_prototype_each_is_compared_as_a_class():
    banks = [build('cumulative', compare=how) for how in (
        'class', 'prototype')]
    anchors, labels, *_ = draw(9, 5)
    losses = []
    for bank in banks:
        bank.update(*draw(60, 1, present=(0, 1, 3)))
        losses.append(bank.loss(anchors, labels, .1, 'energy'))
    torch.testing.assert_close(*losses)


def test_a_start_that_all_ranks_share():
    torch.manual_seed(1)
    first = build('several').mean
    torch.manual_seed(2)
    assert torch.equal(first, build('several').mean)


# Queues


class SlowQueue:
    """A deque for each class."""

    def __init__(self, length):
        self.rows = [deque(maxlen=length) for _ in range(CLASSES)]

    def check(self, bank):
        assert bank.filled.tolist() == [len(rows) for rows in self.rows]
        for c, rows in enumerate(self.rows):
            # From the oldest on: the pointer is where the next one goes.
            places = [(bank.pointer[c].item() - len(rows) + i) % bank.length
                      for i in range(len(rows))]
            assert sorted(places) == list(range(len(rows))) or (
                len(rows) == bank.length)
            assert torch.equal(bank.keys[c][places].double(), torch.stack(
                list(rows)) if rows else bank.keys[c][:0].double())
            assert bank.stored()[1][c].sum() == len(rows)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 7), number=st.integers(1, 9),
       sizes=st.lists(st.integers(0, 25), min_size=1, max_size=4),
       seed=st.integers(0, 99))
def test_a_pixel_queue_keeps_the_latest(length, number, sizes, seed):
    bank = build('pixels', length=length, number=number)
    slow = SlowQueue(length)
    for i, size in enumerate(sizes):
        vectors, labels, scores, *_ = draw(size, seed + i)
        bank.update(vectors, labels, scores)
        for c in range(CLASSES):
            mine = (labels == c).nonzero().flatten().tolist()
            mine.sort(key=lambda n: -scores[n].item())
            slow.rows[c].extend(vectors[n] for n in mine[:number])
        slow.check(bank)


@pytest.mark.parametrize('segment', ['image', 'batch'])
def test_a_segment_queue_keeps_the_latest_means(segment):
    bank = build('images', segment=segment)
    slow = SlowQueue(3)
    for seed in range(6):
        vectors, labels, _, images, number = draw(12, seed)
        bank.update(vectors, labels, None, images, number)
        for c in range(CLASSES):
            for image in range(2) if segment == 'image' else [None]:
                mine = labels == c
                if image is not None:
                    mine &= images == image
                if mine.any():
                    slow.rows[c].append(
                        F.normalize(vectors[mine].mean(0), dim=0))
        for c in range(CLASSES):
            assert bank.filled[c] == len(slow.rows[c])
            places = [(bank.pointer[c].item() - len(slow.rows[c]) + i) % 3
                      for i in range(len(slow.rows[c]))]
            torch.testing.assert_close(
                bank.keys[c][places], torch.stack(list(slow.rows[c])))


def test_a_push_across_the_end_is_split():
    bank = build('pixels', length=5, number=3)
    labels = torch.zeros(3).long()
    scores = torch.tensor([.9, .5, .1])
    for start in (0, 3):
        vectors = torch.arange(start, start + 3).double().unsqueeze(1)
        bank.update(vectors.expand(3, 3), labels, scores)
    assert bank.keys[0, :, 0].tolist() == [5, 1, 2, 3, 4]
    assert bank.pointer.tolist() == [1, 0, 0, 0]
    assert bank.filled.tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize('kind', KINDS)
def test_a_label_inside_the_range_can_be_ignored(kind):
    bank, without = build(kind, ignore_index=1), build(kind)
    vectors, labels, *rest = draw(40, 1)
    labels = labels.where(labels != 255, torch.tensor(-1))
    bank.update(vectors, labels, *rest)
    without.update(
        vectors, labels.where(labels != 1, torch.tensor(-1)), *rest)
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, without.state_dict()[name]), name


def test_no_place_of_the_beginning_survives_a_round():
    bank = build('pixels', length=4, number=1)
    bank.keys.fill_(99)
    for seed in range(4):
        vectors = draw(CLASSES, seed)[0]
        bank.update(vectors, torch.arange(CLASSES), torch.ones(CLASSES))
    assert bank.keys.lt(99).all() and bank.stored()[1].all()


def test_keys_of_half_precision():
    bank = MODELS.build(dict(type='PixelQueue', length=20, number=9,
                             dtype='float16', **SIZES))
    assert bank.keys.dtype == torch.float16
    vectors, labels, scores, *_ = draw(30, 1)
    vectors = F.normalize(vectors, dim=1).float()
    bank.update(vectors, labels, scores)
    full = build('pixels', double=False, length=20, number=9)
    full.update(vectors, labels, scores)
    assert torch.equal(full.keys.half(), bank.keys)
    anchors = vectors[:9].clone().requires_grad_()
    losses = [one.loss(anchors, labels[:9], .07, 'positive')
              for one in (bank, full)]
    assert losses[0].dtype == torch.float32
    assert 0 < abs(losses[0] - losses[1]) < 5e-3
    assert bank.state_dict()['keys'].dtype == torch.float16


# The batch, and learnt tokens


def test_the_batch_is_compared_with_itself():
    bank = MODELS.build(dict(type='BatchBank', chunk_size=2, **SIZES))
    vectors, labels, weights, *_ = draw(12, 3)
    labels[3] = 7  # no class
    anchors = F.normalize(vectors, dim=1).requires_grad_()
    got = bank.loss(anchors, labels, .3, 'positive', .15,
                    anchor_weights=weights, key_weights=weights)
    bank.update(vectors, labels)
    assert not bank.state_dict()
    known = labels < CLASSES
    f, y, w = anchors[known], labels[known], weights[known].double()
    s = f @ f.T / .3
    same = y.unsqueeze(1) == y
    other = s.masked_fill(same, ABSENT).logsumexp(1, keepdim=True)
    same = same & ~torch.eye(len(y), dtype=torch.bool)
    terms = F.softplus(other - s) * w.unsqueeze(1) * w * same
    counts = same.sum(1)
    each = terms.sum(1) / counts.clamp_min(1)
    want = 2 * each.sum() / (counts > 0).sum()
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(one, anchors, retain_graph=True)[0]
             for one in (got, want)]
    torch.testing.assert_close(*grads)
    assert grads[0][3].eq(0).all()


def test_the_batch_is_compared_with_another():
    bank = MODELS.build(dict(type='BatchBank', **SIZES))
    anchors, labels, *_ = draw(8, 3)
    keys, key_labels, *_ = draw(8, 4)
    anchors.requires_grad_()
    keys.requires_grad_()
    loss = bank.loss(anchors, labels, .3, 'energy', keys=keys,
                     key_labels=key_labels)
    want = ops.pair_contrast_loss(
        anchors, keys, ops.same_label(labels, key_labels), .3, own='energy')
    assert loss == want  # key i is no pair of anchor i's own
    grad, = torch.autograd.grad(loss, keys)
    assert grad[key_labels == 255].eq(0).all() and grad.abs().sum() > 0
    with pytest.raises(ValueError, match='keys and key_labels, or neither'):
        bank.loss(anchors, labels, .3, 'energy', keys=keys)


def test_tokens_are_learnt():
    bank = MODELS.build(dict(
        type='PrototypeTokens', prototypes=2, **SIZES)).double()
    anchors, labels, *_ = draw(9, 5)
    anchors.requires_grad_()
    loss = bank.loss(anchors, labels, .5, 'energy')
    tokens = F.normalize(bank.tokens, dim=2)
    known = labels != 255
    want = F.cross_entropy((anchors[known] @ tokens.flatten(0, 1).T / .5)
                           .view(-1, CLASSES, 2).logsumexp(2), labels[known])
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert bank.tokens.grad.abs().sum((1, 2)).gt(0).all()
    assert anchors.grad.abs().sum() > 0
    before = bank.tokens.clone()
    bank.update(*draw(9))
    assert torch.equal(before, bank.tokens)
    assert 0 < before.std() < .05
    raw = MODELS.build(dict(type='PrototypeTokens', normalize=False, **SIZES))
    torch.testing.assert_close(
        raw.energies(anchors.float(), .5),
        anchors.float() @ raw.tokens[:, 0].T / .5)


# Mistakes


@pytest.mark.parametrize('change, message', [
    (dict(type='PrototypeBank', num_classes=0), 'PrototypeBank.num_classes'),
    (dict(type='PrototypeBank', channels=0), 'PrototypeBank.channels'),
    (dict(type='PrototypeBank', prototypes=0), 'prototypes must be at least'),
    (dict(type='PrototypeBank', assign='far'), "assign = 'far' must be"),
    (dict(type='PrototypeBank', compare='all'), "compare = 'all' must be"),
    (dict(type='PrototypeBank', distance_weight=.1),
     "set compare = 'prototype', or leave it out"),
    (dict(type='PrototypeBank', epsilon=0.), 'epsilon must be above 0'),
    (dict(type='PrototypeBank', iterations=0), 'iterations must be at leas'),
    (dict(type='PrototypeBank', clock='sometimes'),
     "PrototypeBank.clock = 'sometimes' must be 'cumulative' or 'ema'"),
    (dict(type='PrototypeBank', clock='ema'),
     r'new_weight.* must lie in \(0, 1\], got None'),
    (dict(type='GaussianBank', clock='ema', new_weight=0.),
     r'GaussianBank.new_weight.* must lie in \(0, 1\], got 0.0'),
    (dict(type='GaussianBank', new_weight=.1), "leave it out with 'cumula"),
    (dict(type='GaussianBank', normalize='unit'), 'GaussianBank.normalize'),
    (dict(type='PixelQueue', length=0), 'PixelQueue.length'),
    (dict(type='PixelQueue', number=0), 'PixelQueue.number'),
    (dict(type='PixelQueue', chunk_size=-1), 'PixelQueue.chunk_size'),
    (dict(type='SegmentQueue', energy='max'), 'SegmentQueue.energy'),
    (dict(type='SegmentQueue', dtype='int8'), "dtype = 'int8' must be"),
    (dict(type='SegmentQueue', segment='row'), 'SegmentQueue.segment'),
    (dict(type='PrototypeTokens', prototypes=0), 'PrototypeTokens.proto')])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**SIZES, **change})


def test_what_an_update_needs_is_named():
    vectors, labels, *_ = draw(5)
    with pytest.raises(ValueError, match='PixelQueue.update needs scores'):
        build('pixels').update(vectors, labels)
    with pytest.raises(ValueError, match='SegmentQueue.update needs images'):
        build('images').update(vectors, labels)


# Checkpoints


@pytest.mark.parametrize('kind', [*KINDS, 'tokens'])
def test_a_checkpoint_of_other_sizes_is_an_error(kind):
    config = KINDS.get(kind, dict(type='PrototypeTokens'))
    model = nn.Module()
    model.bank = MODELS.build({**SIZES, **config})
    other = nn.Module()
    changes = [dict(num_classes=5), dict(channels=7)]
    changes += [dict(length=9)] * ('length' in config)
    changes += [dict(prototypes=2)] * (
        config['type'] in ('PrototypeBank', 'PrototypeTokens'))
    for change in changes:
        other.bank = MODELS.build({**SIZES, **config, **change})
        message = f"{config['type']} bank.* in the checkpoint it has"
        with pytest.raises(ValueError, match=message):
            load_state_dict(model, other.state_dict())
    other.bank = MODELS.build({**SIZES, **config})
    if kind != 'tokens':
        other.bank.update(*draw(30))
    load_state_dict(model, other.state_dict(), strict=True)
    for name, tensor in other.bank.state_dict().items():
        assert torch.equal(tensor, model.bank.state_dict()[name])


@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_bank_goes_on_where_it_was(kind):
    first, second = build(kind), build(kind)
    for seed in range(3):
        first.update(*draw(20, seed))
    second.load_state_dict(first.state_dict())
    for bank in (first, second):
        bank.update(*draw(20, 9))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


# Ranks


def shares(seed):
    """A batch, and its parts of two ranks; sometimes one has nothing."""
    batch = draw(24, seed)
    cut = (7, 24, 0, 15)[seed % 4]
    labels = batch[1].clone()
    if seed % 4 == 3:
        labels[cut:] = 255  # vectors, but no label
    images = torch.zeros(24).long()
    images[cut:] = 1  # one image each
    parts = [
        (batch[0][one], labels[one], batch[2][one], images[one] * 0, 1)
        for one in (slice(0, cut), slice(cut, 24))]
    return (batch[0], labels, batch[2], images, 2), parts


def run_rank(rank, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=(folder / 'meeting').as_uri(), rank=rank,
        world_size=2)
    result = {}
    for kind in (*KINDS, 'transport'):
        bank = build(kind) if kind in KINDS else MODELS.build(
            {**SIZES, **TRANSPORT})
        for seed in range(8):
            bank.update(*shares(seed)[1][rank])
        result[kind] = state(bank)
    torch.save(result, folder / f'{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_same_banks_as_one(tmp_path):
    # Forked, as a new process would import all of mmseg again.
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path, ), nprocs=2, join=False, daemon=True,
        start_method='fork')
    assert any(processes.join(timeout=20) for _ in range(3))
    results = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    for kind, first in results[0].items():
        for name, one in first.items():
            assert torch.equal(one, results[1][kind][name]), (kind, name)
    for kind in KINDS:
        alone = build(kind)
        for seed in range(8):
            batch, parts = shares(seed)
            if kind != 'pixels':
                alone.update(*batch)
                continue
            # Each rank draws from its own: as one after the other.
            for part in parts:
                alone.update(*part)
        once = build('batches')
        for seed in range(8):
            once.update(*shares(seed)[0])
        assert torch.equal(results[0][kind]['age'], once.age)
        for name, one in knowledge(alone).items():
            torch.testing.assert_close(results[0][kind][name], one)


# The device


@pytest.mark.parametrize('kind', [*KINDS, 'transport', 'tokens', 'batch'])
def test_nothing_asks_for_a_value(kind, monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    config = KINDS.get(kind) or dict(
        transport=TRANSPORT, tokens=dict(type='PrototypeTokens'),
        batch=dict(type='BatchBank'))[kind]
    bank = MODELS.build({**SIZES, **config}).to('meta')
    vectors, labels, scores, images, number = draw(9)
    vectors, labels, scores, images = (
        one.to('meta') for one in (vectors.float(), labels, scores, images))
    bank.update(vectors, labels, scores, images, number)
    anchors = vectors.clone().requires_grad_()
    bank.loss(anchors, labels, .1, 'positive', .07,
              anchor_weights=scores).backward()
    assert anchors.grad.shape == (9, WIDTH)


@pytest.mark.parametrize('kind', KINDS)
def test_updates_and_keys_have_no_gradient(kind):
    bank = build(kind)
    vectors, *rest = draw(30)
    bank.update(vectors.requires_grad_(), *rest)
    assert not any(one.requires_grad for one in bank.buffers())
    assert set(dict(bank.named_buffers())) == set(bank.state_dict())


def test_vectors_of_half_precision_make_full_statistics():
    vectors, labels, *_ = draw(30)
    half = vectors.bfloat16()
    for kind in ('cumulative', 'gaussian'):
        first, second = build(kind, False), build(kind, False)
        with torch.autocast('cpu', torch.bfloat16):
            first.update(half, labels)
        second.update(half.float(), labels)
        assert torch.equal(first.mean, second.mean)
        assert first.mean.dtype == torch.float32
