"""Class moments and the contrast kernel, against explicit loops."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mmseg_contrast import ops

ABSENT = -math.inf

# Moments


def draw_vectors(count, seed, classes=4, width=3, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=gen, dtype=dtype)
    labels = torch.randint(0, classes + 1, (count, ), generator=gen)
    labels[labels == classes] = 255
    return vectors, labels


def no_moments(classes=4, width=3, dtype=torch.float64):
    return (torch.zeros(classes, dtype=torch.long),
            torch.zeros(classes, width, dtype=dtype),
            torch.zeros(classes, width, dtype=dtype))


@pytest.mark.parametrize('count', [1, 2, 3, 40])
def test_moments_of_a_batch_equal_the_loops(count):
    vectors, labels = draw_vectors(count, seed=count)
    labels[0] = -1  # out of range: ignored as well
    counts, mean, m2 = ops.class_moments(vectors, labels, 4)
    assert counts.dtype == torch.int64
    for c in range(4):
        mine = vectors[labels == c]
        assert counts[c] == len(mine)
        if len(mine) == 0:
            assert mean[c].eq(0).all() and m2[c].eq(0).all()
            assert ops.class_variance((counts, mean, m2))[c].eq(0).all()
            continue
        torch.testing.assert_close(mean[c], mine.mean(0))
        torch.testing.assert_close(
            m2[c], ((mine - mine.mean(0))**2).sum(0))


def test_moments_equal_a_product_with_one_hot_labels():
    vectors, labels = draw_vectors(40, 0)
    known = labels < 4
    hot = F.one_hot(labels[known], 4).double()
    count, mean, m2 = ops.class_moments(vectors, labels, 4)
    assert torch.equal(count, hot.sum(0).long())
    torch.testing.assert_close(
        mean, hot.T @ vectors[known] / hot.sum(0).unsqueeze(1))
    torch.testing.assert_close(
        m2, hot.T @ (vectors[known] - hot @ mean).square())


def test_a_label_inside_the_range_can_be_ignored():
    vectors, labels = torch.ones(3, 2), torch.tensor([0, 1, 1])
    counts, _, _ = ops.class_moments(vectors, labels, 2, ignore_index=0)
    assert counts.tolist() == [0, 2]


@pytest.mark.parametrize('sizes', [(5, ), (1, 1, 1), (7, 2, 30), (0, 9, 0)])
def test_streamed_moments_equal_two_passes_over_everything(sizes):
    batches = [draw_vectors(n, seed) for seed, n in enumerate(sizes)]
    moments = no_moments()
    for vectors, labels in batches:
        moments = ops.merge_moments(
            moments, ops.class_moments(vectors, labels, 4))
    every = torch.cat([vectors for vectors, _ in batches])
    ids = torch.cat([labels for _, labels in batches])
    for got, want in zip(
            moments, ops.class_moments(every, ids, 4), strict=True):
        torch.testing.assert_close(got, want)
    for c in range(4):
        mine = every[ids == c]
        if len(mine):
            torch.testing.assert_close(
                ops.class_variance(moments)[c], mine.var(0, correction=0))
    torch.testing.assert_close(
        ops.merge_moments(ops.class_moments(every, ids, 4), no_moments()),
        ops.class_moments(every, ids, 4))


def test_an_absent_class_keeps_its_moments_bit_for_bit():
    moments = ops.class_moments(*draw_vectors(50, 0), 4)
    vectors, labels = draw_vectors(50, 1)
    labels[labels == 2] = 255
    merged = ops.merge_moments(
        moments, ops.class_moments(vectors, labels, 4))
    for before, after in zip(moments, merged, strict=True):
        assert torch.equal(before[2], after[2])
        assert not torch.equal(before[1], after[1])


def test_variance_survives_a_mean_far_from_zero():
    # E[x^2] - E[x]^2 would lose all digits here.
    gen = torch.Generator().manual_seed(0)
    vectors = 1000 + .1 * torch.randn(4000, 2, generator=gen)
    labels = torch.zeros(4000, dtype=torch.long)
    moments = no_moments(1, 2, torch.float32)
    for i in range(0, 4000, 500):
        moments = ops.merge_moments(moments, ops.class_moments(
            vectors[i:i + 500], labels[i:i + 500], 1))
    want = vectors.double().var(0, correction=0).float()
    torch.testing.assert_close(
        ops.class_variance(moments)[0], want, rtol=2e-3, atol=0)


def test_counts_do_not_stop_at_the_end_of_float32():
    one = (torch.tensor([2**24]), torch.zeros(1, 1), torch.ones(1, 1))
    new = (torch.tensor([1]), torch.ones(1, 1), torch.zeros(1, 1))
    assert ops.merge_moments(one, new)[0].item() == 2**24 + 1


def test_moments_of_half_precision_are_full_precision():
    vectors, labels = draw_vectors(30, 0)
    half = vectors.bfloat16()
    for got, want in zip(ops.class_moments(half, labels, 4),
                         ops.class_moments(half.float(), labels, 4),
                         strict=True):
        assert torch.equal(got, want)
    wide = ops.merge_moments(
        no_moments(), ops.class_moments(half, labels, 4))
    assert wide[1].dtype == torch.float64


# The kernel


def slow_loss(energies, positives, labels, own):
    """The equation, one exponential at a time."""
    anchors = []
    for row, mine, y in zip(
            energies.detach(), positives, labels, strict=True):
        if not 0 <= y < len(row):
            continue
        others = sum(math.exp(e) for c, e in enumerate(row.tolist())
                     if c != y)
        terms = [
            math.log((math.exp(s) if own == 'positive'
                      else math.exp(row[y])) + others) - s
            for s in mine.tolist() if s > ABSENT]
        if terms and (own == 'positive' or row[y] > ABSENT):
            anchors.append(sum(terms) / len(terms))
    return sum(anchors) / len(anchors)


def draw_energies(count, classes=4, number=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    energies = torch.randn(count, classes, generator=gen).double()
    positives = torch.randn(count, number, generator=gen).double()
    labels = torch.randint(0, classes, (count, ), generator=gen)
    return energies, positives, labels


@pytest.mark.parametrize('own', ['energy', 'positive'])
@pytest.mark.parametrize('count', [1, 2, 3, 20])
def test_the_loss_equals_the_loops(count, own):
    energies, positives, labels = draw_energies(count, seed=count)
    if count > 2:
        energies[:, 2] = ABSENT  # never seen
        positives[0, 1:] = ABSENT
        positives[1] = ABSENT  # no positive: not an anchor
        labels[0], labels[2] = 1, 255
    if count > 3:
        labels[3] = 2
        labels[4:7] = torch.tensor([0, 1, 3])
    got = ops.contrast_loss(energies, positives, labels, own)
    want = slow_loss(energies, positives, labels, own)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_one_own_entry_gives_the_cross_entropy():
    energies, _, labels = draw_energies(12)
    labels[:3] = 255
    positives = ops.own_class(energies, labels)
    assert positives.shape == (12, 1)
    assert positives[:3].eq(ABSENT).all() and positives[3:].isfinite().all()
    want = F.cross_entropy(energies, labels, ignore_index=255)
    for own in ('energy', 'positive'):
        torch.testing.assert_close(
            ops.contrast_loss(energies, positives, labels, own), want)


@pytest.mark.parametrize('own', ['energy', 'positive'])
def test_gradient_of_the_loss(own):
    energies, positives, labels = draw_energies(6)
    labels[0] = 255
    labels[1] = 2  # whose energy is absent
    gone = torch.zeros(6, 3, dtype=torch.bool)
    gone[2, 1:] = gone[3] = True

    def loss(e, p):
        unseen = torch.tensor([False, False, True, False])
        return ops.contrast_loss(
            e.masked_fill(unseen, ABSENT), p.masked_fill(gone, ABSENT),
            labels, own)

    assert torch.autograd.gradcheck(
        loss, (energies.requires_grad_(), positives.requires_grad_()))


@pytest.mark.parametrize('own', ['energy', 'positive'])
def test_no_anchor_gives_zero_with_zero_gradients(own):
    for count, label in ((3, 255), (0, 255)):
        energies, positives, _ = draw_energies(count)
        labels = torch.full((count, ), label)
        energies.requires_grad_()
        positives.requires_grad_()
        loss = ops.contrast_loss(energies, positives, labels, own)
        grads = torch.autograd.grad(loss, (energies, positives))
        assert loss.item() == 0
        assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize('own', ['energy', 'positive'])
def test_a_single_class_gives_finite_gradients(own):
    # Nothing to tell it from: all other classes are absent.
    energies = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    labels = torch.zeros(3, dtype=torch.long)

    def seen():
        # Added, not filled in: all entries are of the graph.
        return energies + torch.tensor([0., ABSENT])

    alone = seen()
    positives = ops.own_class(alone, labels)
    loss = ops.contrast_loss(alone, positives, labels, own)
    grad, = torch.autograd.grad(loss, energies)
    assert loss.item() == 0 and grad.eq(0).all()
    pairs = torch.randn(3, 2, dtype=torch.float64)
    spread = ops.contrast_loss(seen(), pairs, labels, own)
    assert spread.item() == pytest.approx(
        slow_loss(seen(), pairs, labels, own))
    if own == 'energy':
        grad, = torch.autograd.grad(spread, energies)
        torch.testing.assert_close(
            grad, torch.tensor([[1., 0.]] * 3).double() / 3)


def test_an_absent_class_does_not_move_the_loss():
    energies, positives, labels = draw_energies(9)
    wider = torch.cat([energies, torch.full((9, 2), ABSENT)], 1)
    for own in ('energy', 'positive'):
        assert ops.contrast_loss(wider, positives, labels, own) == (
            ops.contrast_loss(energies, positives, labels, own))


@pytest.mark.parametrize('own', ['energy', 'positive'])
def test_large_similarities_neither_overflow_nor_vanish(own):
    energies = torch.tensor([[300., -300., 0.], [-300., 300., 0.]])
    labels = torch.tensor([0, 0])
    positives = ops.own_class(energies, labels)
    easy = ops.contrast_loss(energies[:1], positives[:1], labels[:1], own)
    hard = ops.contrast_loss(energies[1:], positives[1:], labels[1:], own)
    assert easy.item() == 0 and hard.item() == 600
    # A small loss keeps its digits next to large similarities.
    near = torch.tensor([[300., 285.]])
    loss = ops.contrast_loss(
        near, ops.own_class(near, labels[:1]), labels[:1], own)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-15)), rel=1e-5)


def test_a_nan_shows():
    energies, positives, labels = draw_energies(4)
    positives[2, 0] = math.nan
    assert ops.contrast_loss(energies, positives, labels).isnan()
    energies, positives, labels = draw_energies(4)
    energies[2, 0] = math.nan
    assert ops.contrast_loss(energies, positives, labels).isnan()


def test_an_unknown_own_term_is_a_clear_mistake():
    with pytest.raises(ValueError, match="own = 'both' must be"):
        ops.contrast_loss(*draw_energies(2), own='both')


# Energies and positives


def draw_anchors(count=5, width=3, classes=4, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=dtype)

    return draw(count, width), draw(classes, width), draw(
        classes, width).square()


@pytest.mark.parametrize('count', [1, 2, 3])
def test_energies_equal_the_loops(count):
    anchors, mean, variance = draw_anchors(count)
    present = torch.tensor([True, False, True, True])
    prototype = ops.prototype_energies(anchors, mean, .5, present)
    gaussian = ops.gaussian_energies(anchors, mean, variance, .5, present)
    for i in range(count):
        for c in range(4):
            near = (anchors[i] @ mean[c]).item() / .5
            spread = (anchors[i]**2 @ variance[c]).item() / (2 * .5**2)
            if c == 1:
                near = ABSENT
            assert prototype[i, c].item() == pytest.approx(near)
            assert gaussian[i, c].item() == pytest.approx(near + spread)
    everything = ops.prototype_energies(anchors, mean, .5)
    assert torch.equal(everything[:, [0, 2, 3]], prototype[:, [0, 2, 3]])
    assert everything.isfinite().all()


def test_the_gaussian_energy_is_the_mean_over_drawn_keys():
    gen = torch.Generator().manual_seed(0)
    anchor = torch.tensor([[.5, -.3]], dtype=torch.float64)
    mean = torch.tensor([[.2, .4]], dtype=torch.float64)
    variance = torch.tensor([[.3, .1]], dtype=torch.float64)
    keys = mean + variance.sqrt() * torch.randn(
        400000, 2, generator=gen, dtype=torch.float64)
    drawn = (anchor @ keys.T / .5).exp().mean().log()
    got = ops.gaussian_energies(anchor, mean, variance, .5)
    assert got.item() == pytest.approx(drawn.item(), abs=5e-3)


def test_a_full_covariance_is_a_diagonal_one_along_its_axes():
    # A full Sigma does not fit a bank of 19 classes of 512 features; where it
    # does, its eigenvectors turn anchors and means.
    gen = torch.Generator().manual_seed(0)
    anchor = torch.tensor([[.5, -.3, .8]], dtype=torch.float64)
    mean = torch.tensor([[.2, .4, -.1]], dtype=torch.float64)
    root = torch.tensor([[.6, .0, .0], [.3, .4, .0], [-.2, .5, .3]],
                        dtype=torch.float64)
    covariance = root @ root.T
    tau = .7
    variance, axes = torch.linalg.eigh(covariance)
    got = ops.gaussian_energies(
        anchor @ axes, mean @ axes, variance.unsqueeze(0), tau).item()
    assert got == pytest.approx(
        (anchor @ mean.T / tau
         + anchor @ covariance @ anchor.T / (2 * tau**2)).item(), abs=1e-12)
    diagonal = ops.gaussian_energies(
        anchor, mean, covariance.diagonal().unsqueeze(0), tau).item()
    assert abs(got - diagonal) > .1
    keys = mean + torch.randn(
        400000, 3, generator=gen, dtype=torch.float64) @ root.T
    drawn = (anchor @ keys.T / tau).exp().mean().log().item()
    assert got == pytest.approx(drawn, abs=5e-3)


def test_a_distribution_without_width_is_a_prototype():
    anchors, mean, variance = draw_anchors()
    assert torch.equal(
        ops.gaussian_energies(anchors, mean, 0 * variance, .1),
        ops.prototype_energies(anchors, mean, .1))


def draw_bank(count=5, width=3, classes=4, length=3):
    anchors, _, _ = draw_anchors(count, width, classes)
    gen = torch.Generator().manual_seed(1)
    keys = torch.randn(classes, length, width, generator=gen).double()
    filled = torch.ones(classes, length, dtype=torch.bool)
    filled[0, 1:] = filled[2] = False
    keys[~filled] = 1e9  # what an empty place holds must not matter
    labels = torch.arange(count) % classes
    return anchors, keys, filled, labels


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_the_bank_equals_the_loops(count):
    anchors, keys, filled, labels = draw_bank(count)
    labels[-1] = 255
    energies = ops.bank_energies(anchors, keys, filled, .2)
    positives = ops.bank_positives(anchors, labels, keys, filled, .2)
    assert energies.shape == (count, 4) and positives.shape == (count, 3)
    for i in range(count):
        for c in range(4):
            there = [(anchors[i] @ keys[c, m]).item() / .2
                     for m in range(3) if filled[c, m]]
            want = sum(there) / len(there) if there else ABSENT
            assert energies[i, c].item() == pytest.approx(want)
        for m in range(3):
            y = labels[i].item()
            want = ABSENT if y == 255 or not filled[y, m] else (
                anchors[i] @ keys[y, m]).item() / .2
            assert positives[i, m].item() == pytest.approx(want)


def test_a_bank_of_one_key_is_a_prototype():
    anchors, mean, _ = draw_anchors()
    labels = torch.tensor([0, 1, 2, 3, 255])
    filled = torch.ones(4, 1, dtype=torch.bool)
    energies = ops.prototype_energies(anchors, mean, .1)
    prototype = ops.contrast_loss(
        energies, ops.own_class(energies, labels), labels)
    keys = mean.unsqueeze(1)
    bank = ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, .1),
        ops.bank_positives(anchors, labels, keys, filled, .1), labels,
        own='positive')
    torch.testing.assert_close(bank, prototype)


@pytest.mark.parametrize('kind', ['prototype', 'gaussian', 'bank'])
def test_gradient_with_respect_to_the_anchors(kind):
    anchors, keys, filled, labels = draw_bank()
    labels[0] = 255
    _, mean, variance = draw_anchors()
    present = torch.tensor([True, True, False, True])

    def loss(q):
        if kind == 'bank':
            return ops.contrast_loss(
                ops.bank_energies(q, keys, filled, .7),
                ops.bank_positives(q, labels, keys, filled, .7), labels,
                own='positive')
        near = ops.prototype_energies(q, mean, .7, present)
        energies = near if kind == 'prototype' else ops.gaussian_energies(
            q, mean, variance, .7, present)
        return ops.contrast_loss(
            energies, ops.own_class(near, labels), labels)

    anchors.requires_grad_()
    assert torch.autograd.gradcheck(loss, anchors)
    grad, = torch.autograd.grad(loss(anchors), anchors)
    assert grad[0].eq(0).all() and grad[2].eq(0).all()
    assert grad[[1, 3]].abs().sum(1).gt(0).all()


@pytest.mark.parametrize('kind', ['prototype', 'gaussian', 'bank'])
def test_autocast_changes_nothing(kind):
    anchors, mean, variance = draw_anchors(40, 64, 4, dtype=torch.float32)
    labels = torch.arange(40) % 4
    keys = mean.unsqueeze(1).repeat(1, 2, 1)
    filled = torch.ones(4, 2, dtype=torch.bool)

    def loss():
        near = ops.prototype_energies(anchors, mean, .1)
        if kind == 'bank':
            return ops.contrast_loss(
                ops.bank_energies(anchors, keys, filled, .1),
                ops.bank_positives(anchors, labels, keys, filled, .1),
                labels, own='positive')
        energies = near if kind == 'prototype' else ops.gaussian_energies(
            anchors, mean, variance, .1)
        return ops.contrast_loss(
            energies, ops.own_class(near, labels), labels)

    full = loss()
    with torch.autocast('cpu', torch.bfloat16):
        mixed = loss()
    assert mixed.dtype == torch.float32
    assert torch.equal(full, mixed)


def test_half_precision_anchors_give_full_precision():
    anchors, mean, variance = draw_anchors(dtype=torch.float32)
    half = anchors.bfloat16()
    for wide, narrow in (
            (ops.prototype_energies(half.float(), mean, .1),
             ops.prototype_energies(half, mean, .1)),
            (ops.gaussian_energies(half.float(), mean, variance, .1),
             ops.gaussian_energies(half, mean, variance, .1))):
        assert torch.equal(wide, narrow) and narrow.dtype == torch.float32


# The regulariser


@pytest.mark.parametrize('present', [
    None, [True, False, True, True], [True, False, False, True]])
def test_the_regularizer_equals_the_loops(present):
    anchors, mean, _ = draw_anchors(6)
    labels = torch.tensor([0, 255, 3, 1, 9, 1])
    centre = (anchors[0] + anchors[2] + anchors[3] + anchors[5]) / 4
    seen = [c for c in range(4) if present is None or present[c]]
    scores = [(centre @ mean[c]).item() / .5 for c in seen]
    norm = math.log(sum(math.exp(s) for s in scores))
    want = sum(s - norm for s in scores) / (len(seen) * math.log(len(seen)))
    got = ops.contrast_regularizer(
        anchors, labels, mean, .5,
        None if present is None else torch.tensor(present))
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_the_regularizer_is_minus_one_at_the_centre():
    anchors = torch.tensor([[1., 0.], [-1., 0.]])
    mean = torch.eye(2)
    labels = torch.tensor([0, 1])
    at_centre = ops.contrast_regularizer(anchors, labels, mean, .1)
    aside = ops.contrast_regularizer(anchors[:1], labels[:1], mean, .1)
    assert at_centre.item() == pytest.approx(-1) and aside < at_centre


@pytest.mark.parametrize('labels, present', [
    ([255, 255], [True, True]), ([0, 1], [True, False]),
    ([0, 1], [False, False])])
def test_a_regularizer_of_nothing_is_zero(labels, present):
    anchors = torch.randn(2, 3).requires_grad_()
    value = ops.contrast_regularizer(
        anchors, torch.tensor(labels), torch.randn(2, 3), .1,
        torch.tensor(present))
    grad, = torch.autograd.grad(value, anchors)
    assert value.item() == 0 and grad.eq(0).all()


def test_gradient_of_the_regularizer():
    anchors, mean, _ = draw_anchors()
    labels = torch.tensor([0, 1, 255, 3, 0])
    present = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(
        lambda q: ops.contrast_regularizer(q, labels, mean, .5, present),
        anchors.requires_grad_())


# The device


def test_nothing_asks_for_a_value(monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    anchors, keys, filled, labels = (t.to('meta') for t in draw_bank(8))
    _, mean, variance = (t.to('meta') for t in draw_anchors())
    moments = ops.class_moments(anchors, labels, 4)
    moments = ops.merge_moments(moments, moments)
    ops.class_variance(moments)
    anchors.requires_grad_()
    near = ops.prototype_energies(anchors, mean, .5, moments[0] > 0)
    energies = ops.gaussian_energies(anchors, mean, variance, .5)
    loss = ops.contrast_loss(energies, ops.own_class(near, labels), labels)
    loss = loss + ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, .5),
        ops.bank_positives(anchors, labels, keys, filled, .5), labels,
        own='positive')
    loss = loss + ops.contrast_regularizer(anchors, labels, mean, .5)
    loss.backward()
    assert anchors.grad.shape == (8, 3)
