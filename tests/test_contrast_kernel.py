"""The contrast kernel against loops, closed forms and its own dense form."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_contrast import ops
from mmseg_contrast.ops import contrast_keys
from mmseg_contrast.ops.chunked_loss import anchors_at_once

ABSENT = -math.inf
EXACT = dict(rtol=1e-12, atol=1e-12)
OWN = ('energy', 'positive')
REDUCE = ('mean', 'lse')


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(
        torch.randn(shape, generator=generator(seed), dtype=dtype), dim=-1)


def draw_labels(count, classes, seed=0, ignored=.2):
    gen = generator(seed)
    labels = torch.randint(0, classes, (count, ), generator=gen)
    labels[torch.rand(count, generator=gen) < ignored] = 255
    return labels


def logsumexp(values):
    return math.log(sum(math.exp(v) for v in values)) if values else ABSENT


def slow_pairs(anchors, keys, relation, tau, own='positive', reduce='mean',
               a=None, b=None):
    """The equation, pair by pair."""
    anchors, keys = anchors.detach(), keys.detach()
    each = []
    for i in range(len(anchors)):
        s = [(anchors[i] @ k).item() / tau for k in keys]
        plus = [j for j in range(len(keys)) if relation[i, j] > 0]
        minus = [s[j] for j in range(len(keys)) if relation[i, j] < 0]
        if not plus:
            continue
        every = logsumexp([s[j] for j in plus])
        positives = [every] if reduce == 'lse' else [s[j] for j in plus]
        total = 0.
        for place, positive in enumerate(positives):
            mine = every if own == 'energy' else positive
            weight = 1. if b is None else b[plus[place]].item()
            total += weight * (logsumexp([mine, *minus]) - positive)
        weight = 1. if a is None else a[i].item()
        each.append(weight * total / len(positives))
    return sum(each) / max(1, len(each))


# The class form


def draw_bank(count=11, classes=4, length=3, width=5, seed=0):
    anchors = unit(count, width, seed=seed)
    keys = unit(classes, length, width, seed=seed + 1)
    filled = torch.rand(classes, length, generator=generator(seed + 2)) < .7
    filled[0] = True
    keys[~filled] = 1e3  # what an empty place holds must not matter
    return anchors, draw_labels(count, classes, seed + 3), keys, filled


def dense(anchors, labels, keys, filled, tau, own, reduce, energy, a=None,
          b=None):
    """The loss from energies and positives that exist as a whole."""
    ids = labels.clamp(max=len(filled) - 1)
    return ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, tau, energy),
        ops.bank_positives(anchors, labels, keys, filled, tau), labels, own,
        reduce_positives=reduce, anchor_weights=a,
        positive_weights=None if b is None else b[ids])


def compare(chunked, whole, leaves, tolerance=EXACT):
    """Equal losses and gradients of all leaves."""
    torch.testing.assert_close(chunked, whole, **tolerance)
    for got, want in zip(torch.autograd.grad(chunked, leaves),
                         torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize('energy', ['lse', 'mean'])
@pytest.mark.parametrize('reduce', REDUCE)
@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('chunk', [1, 4, None])
def test_chunks_of_the_class_form_equal_the_dense_loss(
        chunk, own, reduce, energy):
    anchors, labels, keys, filled = draw_bank()
    leaves = [anchors.requires_grad_(), keys.requires_grad_()]
    chunked = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, own=own, reduce_positives=reduce,
        energy=energy, chunk_size=chunk)
    compare(chunked, dense(
        anchors, labels, keys, filled, .3, own, reduce, energy), leaves)


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('energy', ['lse', 'mean'])
def test_weights_of_the_class_form_have_gradients(own, energy):
    anchors, labels, keys, filled = draw_bank()
    a = torch.rand(11, generator=generator(7)).double()
    b = torch.rand(4, 3, generator=generator(8)).double()
    leaves = [one.requires_grad_() for one in (anchors, a, b)]
    chunked = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, own=own, energy=energy,
        anchor_weights=a, key_weights=b, chunk_size=3)
    compare(chunked, dense(
        anchors, labels, keys, filled, .3, own, 'mean', energy, a, b),
        leaves)


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('energy', ['lse', 'mean'])
def test_gradients_of_the_class_form(own, energy):
    anchors, labels, keys, filled = draw_bank(6)
    inputs = [one.requires_grad_() for one in (
        anchors, keys, torch.rand(6).double(), torch.rand(4, 3).double())]
    assert torch.autograd.gradcheck(
        lambda q, k, a, b: ops.class_contrast_loss(
            q, labels, k, filled, .5, .2, own, energy=energy,
            anchor_weights=a, key_weights=b, chunk_size=4), inputs)


def test_sorted_keys_are_pairs_by_label():
    # A class's energy is the sum over its keys, so both forms are one.
    anchors, labels, keys, filled = draw_bank()
    key_labels = torch.arange(4).repeat_interleave(3)
    key_labels[~filled.flatten()] = 255
    for own, reduce in itertools.product(OWN, REDUCE):
        by_class = ops.class_contrast_loss(
            anchors, labels, keys, filled, .3, own=own,
            reduce_positives=reduce)
        pairs = ops.pair_contrast_loss(
            anchors, keys.flatten(0, 1),
            ops.same_label(labels, key_labels), .3, own=own,
            reduce_positives=reduce)
        torch.testing.assert_close(by_class, pairs, **EXACT)


# The pair form


def draw_relation(count, keys, seed=0):
    relation = torch.randint(
        -1, 2, (count, keys), generator=generator(seed))
    if count > 3:
        relation[0] = relation[0].clamp(max=0)  # no positive
        relation[1] = relation[1].clamp(min=0)  # no negative
        relation[2] = 0
        relation[3, :] = -1
        relation[3, 0] = 1  # one positive
    return relation


@pytest.mark.parametrize('reduce', REDUCE)
@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('chunk', [1, 3, None])
def test_pairs_equal_the_loops(chunk, own, reduce):
    anchors, keys = unit(8, 4), unit(6, 4, seed=1)
    relation = draw_relation(8, 6)
    a = torch.rand(8, generator=generator(2)).double()
    b = torch.rand(6, generator=generator(3)).double()
    b = None if reduce == 'lse' else b
    got = ops.pair_contrast_loss(
        anchors, keys, relation, .4, .1, own, reduce, anchor_weights=a,
        key_weights=b, chunk_size=chunk)
    want = slow_pairs(anchors, keys, relation, .4, own, reduce, a, b)
    assert got.item() == pytest.approx(want * .4 / .1, rel=1e-12)


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('reduce', REDUCE)
def test_gradients_of_pairs(own, reduce):
    relation = draw_relation(7, 5)
    inputs = [unit(7, 3), unit(5, 3, seed=1), torch.rand(7).double()]
    if reduce == 'mean':
        inputs.append(torch.rand(5).double())
    inputs = [one.requires_grad_() for one in inputs]
    assert torch.autograd.gradcheck(
        lambda q, k, a, b=None: ops.pair_contrast_loss(
            q, k, relation, .5, .2, own, reduce, anchor_weights=a,
            key_weights=b, chunk_size=3), inputs)


@pytest.mark.parametrize('own', OWN)
def test_gradients_reach_anchors_that_are_keys(own):
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 255])
    rule = ops.same_label(labels, labels)
    weights = torch.rand(7, generator=generator(1)).double()

    def loss(q, w, chunk=2):
        q = F.normalize(q, dim=1)
        return ops.pair_contrast_loss(
            q, q, rule, .5, own=own, exclude_self=True, anchor_weights=w,
            key_weights=w, chunk_size=chunk)

    inputs = [unit(7, 3).requires_grad_(), weights.requires_grad_()]
    assert torch.autograd.gradcheck(loss, inputs)
    grad, of_weights = torch.autograd.grad(loss(*inputs), inputs)
    # Neither an ignored anchor nor key moves; one alone is a negative.
    assert grad[6].eq(0).all() and of_weights[5:].eq(0).all()
    assert grad[5].abs().sum() > 0


def test_no_pair_with_oneself_when_asked():
    anchors = unit(5, 4)
    labels = torch.tensor([0, 0, 1, 1, 2])
    relation = (labels.unsqueeze(1) == labels).long() * 2 - 1
    for chunk in (2, None):
        got = ops.pair_contrast_loss(
            anchors, anchors, relation, .3, exclude_self=True,
            chunk_size=chunk)
        others = relation * (1 - torch.eye(5, dtype=torch.long))
        assert got.item() == pytest.approx(
            slow_pairs(anchors, anchors, others, .3), rel=1e-12)
    assert ops.pair_contrast_loss(
        anchors, anchors, relation, .3).item() == pytest.approx(
            slow_pairs(anchors, anchors, relation, .3), rel=1e-12)
    # Nor is anything a negative of itself.
    got = ops.pair_contrast_loss(
        anchors, anchors, -relation, .3, exclude_self=True)
    assert got.item() == pytest.approx(
        slow_pairs(anchors, anchors, -others, .3), rel=1e-12)


def test_rules_give_the_relation():
    labels = torch.tensor([0, 1, 255, -1])
    keys = torch.tensor([1, 0, 255, 2, -1])
    every = slice(0, 4)
    assert ops.same_label(labels, keys)(every).tolist() == [
        [-1, 1, 0, -1, 0], [1, -1, 0, -1, 0], [0] * 5, [0] * 5]
    assert ops.same_label(labels, keys, 1)(slice(1, 3)).tolist() == [
        [0] * 5, [0, -1, 1, -1, 0]]
    images, key_images = torch.tensor([0, 0, 0, 0]), torch.tensor(
        [0, 1, 0, 1, 0])
    assert ops.same_label_across_images(
        labels, images, keys, key_images)(every).tolist() == [
            [-1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]


# Closed forms of contrast.md


def test_supervised_contrast_by_its_textbook_formula():
    anchors, labels = unit(9, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 1])
    got = ops.pair_contrast_loss(
        anchors, anchors, ops.same_label(labels, labels), .2, own='energy',
        exclude_self=True)
    s = anchors @ anchors.T / .2
    s.fill_diagonal_(ABSENT)
    logs = s - s.logsumexp(1, keepdim=True)
    same = (labels.unsqueeze(1) == labels) & ~torch.eye(9, dtype=torch.bool)
    want = -(logs.where(same, torch.zeros(())).sum(1) / same.sum(1)).mean()
    torch.testing.assert_close(got, want, **EXACT)


def test_one_positive_each_is_cross_entropy():
    # SimCLR: two views, the other view of the same image is the positive.
    views = torch.cat([unit(5, 4), unit(5, 4, seed=1)])
    ids = torch.arange(5).repeat(2)
    s = views @ views.T / .5
    s.fill_diagonal_(ABSENT)
    want = F.cross_entropy(s, (torch.arange(10) + 5) % 10)
    for own in OWN:
        got = ops.pair_contrast_loss(
            views, views, ops.same_label(ids, ids), .5, own=own,
            exclude_self=True)
        torch.testing.assert_close(got, want, **EXACT)


def test_the_loss_is_scaled_by_the_base_temperature():
    anchors, labels, keys, filled = draw_bank()
    plain = ops.class_contrast_loss(anchors, labels, keys, filled, .1)
    for base, factor in ((.07, .1 / .07), (.1, 1), (None, 1)):
        torch.testing.assert_close(
            ops.class_contrast_loss(
                anchors, labels, keys, filled, .1, base), plain * factor)


def test_the_bank_loss_has_class_means_as_negatives():
    anchors, labels, keys, filled = draw_bank()
    got = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, energy='mean')
    each = []
    for f, y in zip(anchors, labels.tolist(), strict=True):
        if y == 255 or not filled[y].any():
            continue
        negatives = [(keys[c][filled[c]] @ f / .3).mean().item()
                     for c in range(4) if c != y and filled[c].any()]
        each.append(sum(
            logsumexp([s, *negatives]) - s
            for s in (keys[y][filled[y]] @ f / .3).tolist()
        ) / filled[y].sum().item())
    assert got.item() == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_positives_of_other_images_but_no_negatives():
    # Zhao: own energy over view and other images, others over the view.
    view, other = unit(6, 4), unit(5, 4, seed=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    more = torch.tensor([0, 1, 1, 2, 0])
    anchors = unit(6, 4, seed=2)
    keys, ids = torch.cat([view, other]), torch.cat([labels, more])
    images = torch.tensor([0] * 6 + [1] * 5)
    got = ops.pair_contrast_loss(
        anchors, keys, ops.same_label_across_images(
            labels, images[:6], ids, images), .3, own='energy')
    s = anchors @ keys.T / .3
    total = 0.
    for i in range(6):
        same = ids == labels[i]
        denominator = s[i][same | (images == 0)].logsumexp(0)
        total += (denominator - s[i][same]).mean().item()
    assert got.item() == pytest.approx(total / 6, rel=1e-12)


def test_one_positive_and_drawn_negatives_are_two_energies():
    # ReCo, U2PL: cross entropy with the positive at place 0.
    anchors, mean = unit(6, 4), unit(6, 4, seed=1)
    negatives = unit(6, 7, 4, seed=2)
    positive = (anchors * mean).sum(1, keepdim=True) / .5
    others = (negatives @ anchors.unsqueeze(2)).squeeze(2) / .5
    want = F.cross_entropy(
        torch.cat([positive, others], 1), torch.zeros(6).long())
    energies = torch.cat(
        [positive, others.logsumexp(1, keepdim=True)], 1)
    for own in OWN:
        got = ops.contrast_loss(
            energies, positive, torch.zeros(6).long(), own)
        torch.testing.assert_close(got, want, **EXACT)


def test_a_sum_of_weights_is_a_sum_of_losses():
    # CLUDA: w_i w_j within a resolution, 1 - w_i w_j across.
    anchors, keys = unit(6, 4), unit(5, 4, seed=1)
    relation, w = draw_relation(6, 5), torch.rand(6).double()
    v = torch.rand(5).double()

    def loss(**weights):
        return ops.pair_contrast_loss(
            anchors, keys, relation, .5, **weights).item()

    got = loss() - loss(anchor_weights=w, key_weights=v)
    total, number = 0., 0
    for i in range(6):
        plus = (relation[i] > 0).nonzero().flatten().tolist()
        s = anchors[i] @ keys.T / .5
        minus = s[relation[i] < 0].tolist()
        number += bool(plus)
        total += sum(
            (1 - w[i] * v[j]).item() * (
                logsumexp([s[j].item(), *minus]) - s[j].item())
            for j in plus) / max(1, len(plus))
    assert got == pytest.approx(total / number, rel=1e-11)


def test_weights_of_a_batch_count_in_the_dense_form_too():
    energies = torch.randn(4, 3, generator=generator(0)).double()
    positives = torch.randn(4, 2, generator=generator(1)).double()
    positives[1, 1] = ABSENT
    labels = torch.tensor([0, 1, 2, 255])
    a = torch.tensor([.5, 2., 0., 9.]).double().requires_grad_()
    b = torch.rand(4, 2, generator=generator(2)).double().requires_grad_()
    got = ops.contrast_loss(
        energies, positives, labels, 'positive', anchor_weights=a,
        positive_weights=b)
    total = 0.
    for i, y in enumerate(labels[:3].tolist()):
        there = [p for p in range(2) if positives[i, p] > ABSENT]
        others = [energies[i, c].item() for c in range(3) if c != y]
        total += a[i].item() * sum(
            b[i, p].item() * (
                logsumexp([positives[i, p].item(), *others])
                - positives[i, p].item()) for p in there) / len(there)
    # An anchor of weight 0 is an anchor; an ignored one is not.
    assert got.item() == pytest.approx(total / 3, rel=1e-12)
    grads = torch.autograd.grad(got, (a, b))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][3] == 0 and grads[1][1, 1] == 0


# Limits


def prototype_gradient(tau):
    anchors = unit(6, 8, dtype=torch.float32).requires_grad_()
    mean = unit(5, 8, seed=1, dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = ops.class_contrast_loss(
        anchors, labels, mean.unsqueeze(1),
        torch.ones(5, 1, dtype=torch.bool), tau, own='energy')
    grad, = torch.autograd.grad(loss, anchors)
    return anchors.detach(), mean, labels, loss, grad * 6


def test_a_hot_softmax_is_linear():
    for tau in (100., 1000.):
        _, mean, labels, _, grad = prototype_gradient(tau)
        want = (mean.mean(0) - mean[labels]) / tau
        assert (grad - want).norm() / want.norm() < .3 / tau


def test_a_cold_softmax_is_the_largest_margin():
    anchors, mean, labels, loss, grad = prototype_gradient(1e-4)
    s = anchors @ mean.T
    own = s.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = s.scatter(1, labels.unsqueeze(1), ABSENT).amax(1)
    want = (others - own).clamp_min(0).mean()
    assert 1e-4 * loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert grad.isfinite().all()


def test_the_gradient_is_softmax_minus_target():
    for tau in (.01, .1, 1., 50.):
        anchors, mean, labels, _, grad = prototype_gradient(tau)
        p = (anchors @ mean.T / tau).softmax(1)
        want = (p @ mean - mean[labels]) / tau
        torch.testing.assert_close(
            grad, want, rtol=1e-4, atol=1e-5 / tau)


@pytest.mark.parametrize('tau', [1e-3, .07, 1., 100.])
def test_float32_keeps_its_digits_at_any_temperature(tau):
    anchors, labels, keys, filled = draw_bank(12, 5, 4, 8)
    wide = [anchors.requires_grad_()]
    want = ops.class_contrast_loss(anchors, labels, keys, filled, tau)
    narrow = anchors.detach().float().requires_grad_()
    got = ops.class_contrast_loss(
        narrow, labels, keys.float(), filled, tau)
    assert got.item() == pytest.approx(want.item(), rel=2e-6)
    a, = torch.autograd.grad(want, wide)
    b, = torch.autograd.grad(got, narrow)
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize('form', ['class', 'pair'])
def test_autocast_and_half_precision_change_nothing(form):
    anchors = unit(9, 16, dtype=torch.float32).bfloat16().float()
    keys = unit(4, 3, 16, seed=1, dtype=torch.float32).half()
    labels = draw_labels(9, 4)
    filled = torch.ones(4, 3, dtype=torch.bool)
    ids = torch.arange(4).repeat_interleave(3)

    def loss(q, k):
        q = q.detach().requires_grad_()
        value = ops.class_contrast_loss(q, labels, k, filled, .07) if (
            form == 'class') else ops.pair_contrast_loss(
                q, k.flatten(0, 1), ops.same_label(labels, ids), .07)
        value.backward()
        return value, q.grad

    full, grad = loss(anchors, keys.float())
    with torch.autocast('cpu', torch.bfloat16):
        mixed, same = loss(anchors, keys.float())
    assert torch.equal(full, mixed) and torch.equal(grad, same)
    half, narrow = loss(anchors.bfloat16(), keys)
    assert half.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    assert torch.equal(full, half)
    assert torch.equal(narrow, grad.bfloat16())


# Invariances


@settings(max_examples=15, deadline=None, derandomize=True)
@given(count=st.integers(0, 9), classes=st.integers(1, 5),
       length=st.integers(1, 4), chunk=st.integers(1, 10),
       tau=st.sampled_from([.01, .1, 1., 100.]), own=st.sampled_from(OWN),
       reduce=st.sampled_from(REDUCE), energy=st.sampled_from(
           ['lse', 'mean']), seed=st.integers(0, 99))
def test_any_class_form_equals_the_dense_loss(
        count, classes, length, chunk, tau, own, reduce, energy, seed):
    anchors, labels, keys, filled = draw_bank(
        count, classes, length, 3, seed)
    anchors.requires_grad_()
    compare(
        ops.class_contrast_loss(
            anchors, labels, keys, filled, tau, own=own,
            reduce_positives=reduce, energy=energy, chunk_size=chunk),
        dense(anchors, labels, keys, filled, tau, own, reduce, energy),
        [anchors], dict(rtol=1e-10, atol=1e-10))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(count=st.integers(1, 7), keys=st.integers(1, 7),
       chunk=st.integers(1, 8), tau=st.sampled_from([.1, 1., 100.]),
       own=st.sampled_from(OWN), reduce=st.sampled_from(REDUCE),
       seed=st.integers(0, 99))
def test_any_pairs_equal_the_loops(
        count, keys, chunk, tau, own, reduce, seed):
    anchors, others = unit(count, 3, seed=seed), unit(keys, 3, seed=seed + 1)
    relation = draw_relation(count, keys, seed)
    anchors.requires_grad_()
    got = ops.pair_contrast_loss(
        anchors, others, relation, tau, own=own, reduce_positives=reduce,
        chunk_size=chunk)
    assert got.item() == pytest.approx(
        slow_pairs(anchors, others, relation, tau, own, reduce), rel=1e-9)
    grad, = torch.autograd.grad(got, anchors)
    assert grad.isfinite().all()


def test_order_and_names_of_classes_do_not_matter():
    anchors, labels, keys, filled = draw_bank(20)
    labels = labels.where(labels < 4, torch.tensor(255))
    want = ops.class_contrast_loss(anchors, labels, keys, filled, .3)
    order = torch.randperm(20, generator=generator(5))
    torch.testing.assert_close(ops.class_contrast_loss(
        anchors[order], labels[order], keys, filled, .3), want, **EXACT)
    names = torch.tensor([2, 0, 3, 1])
    back = names.argsort()
    renamed = names[labels.clamp(max=3)].where(labels < 4, labels)
    torch.testing.assert_close(ops.class_contrast_loss(
        anchors, renamed, keys[back], filled[back], .3), want, **EXACT)


@pytest.mark.parametrize('energy', ['lse', 'mean'])
def test_a_class_without_keys_does_not_move_the_loss(energy):
    anchors, labels, keys, filled = draw_bank()
    want = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, energy=energy)
    more = torch.cat([keys, torch.zeros(1, 3, 5)])
    got = ops.class_contrast_loss(
        anchors, labels, more,
        torch.cat([filled, torch.zeros(1, 3, dtype=torch.bool)]), .3,
        energy=energy)
    torch.testing.assert_close(got, want, **EXACT)


def test_shuffled_labels_of_separate_clusters_cost_more():
    centres = torch.eye(4).double()
    labels = torch.arange(40) % 4
    anchors = F.normalize(
        centres[labels] + .1 * torch.randn(
            40, 4, generator=generator(0)).double(), dim=1)
    wrong = labels[torch.randperm(40, generator=generator(1))]
    keys, filled = centres.unsqueeze(1), torch.ones(4, 1, dtype=torch.bool)
    for own in OWN:
        right, mixed = (ops.class_contrast_loss(
            anchors, y, keys, filled, .1, own=own) for y in (labels, wrong))
        assert mixed > 10 * right
        right, mixed = (ops.pair_contrast_loss(
            anchors, anchors, ops.same_label(y, y), .1, own=own,
            exclude_self=True) for y in (labels, wrong))
        assert mixed > 1.5 * right


# Degenerate input


@pytest.mark.parametrize('count, places', [(0, 3), (4, 0), (4, 3), (0, 0)])
def test_nothing_to_compare_is_zero_and_connected(count, places):
    anchors = unit(count, 5).requires_grad_()
    keys = unit(2, places, 5, seed=1).requires_grad_()
    a = torch.ones(count).double().requires_grad_()
    labels = torch.full((count, ), 255)
    filled = torch.ones(2, places, dtype=torch.bool)
    ids = torch.arange(2).repeat_interleave(places)
    b = torch.ones(2, places).double().requires_grad_()
    flat = torch.ones(2 * places).double().requires_grad_()
    for loss, weight in (
            (ops.class_contrast_loss(
                anchors, labels, keys, filled, .1, anchor_weights=a,
                key_weights=b), b),
            (ops.pair_contrast_loss(
                anchors, keys.flatten(0, 1), ops.same_label(labels, ids),
                .1, anchor_weights=a, key_weights=flat), flat)):
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (anchors, keys, a, weight)):
            assert grad.eq(0).all()


@pytest.mark.parametrize('own', OWN)
def test_an_anchor_without_a_positive_is_skipped(own):
    anchors = unit(3, 4).requires_grad_()
    labels = torch.tensor([0, 0, 1])  # class 1 has one pixel only
    loss = ops.pair_contrast_loss(
        anchors, anchors, ops.same_label(labels, labels), .5, own=own,
        exclude_self=True)
    s = (anchors @ anchors.T / .5).tolist()
    want = sum(logsumexp([s[0][1], s[i][2]]) - s[0][1] for i in (0, 1)) / 2
    assert loss.item() == pytest.approx(want, rel=1e-12)
    loss.backward()
    assert anchors.grad.isfinite().all()


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('energy', ['lse', 'mean'])
def test_a_single_class_has_nothing_to_be_told_from(own, energy):
    anchors = unit(3, 4).requires_grad_()
    keys = unit(2, 1, 4, seed=1)
    filled = torch.tensor([[True], [False]])
    loss = ops.class_contrast_loss(
        anchors, torch.zeros(3).long(), keys, filled, .1, own=own,
        energy=energy)
    loss.backward()
    assert loss.item() == 0 and anchors.grad.eq(0).all()


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('reduce', REDUCE)
def test_no_nan_on_the_way_either(own, reduce):
    # Masked later, but autograd's search for mistakes would stop at it.
    relation = draw_relation(7, 5)
    anchors, keys = unit(7, 3).requires_grad_(), unit(5, 3, seed=1)
    positives = torch.tensor([[0., ABSENT], [ABSENT, ABSENT]]).double()
    with torch.autograd.set_detect_anomaly(True):
        ops.pair_contrast_loss(
            anchors, keys, relation, .5, own=own, reduce_positives=reduce
        ).backward()
        # Added, not filled in: nothing masks the gradient.
        ops.contrast_loss(
            anchors[:2] @ keys.T, anchors[:2, :2] + positives,
            torch.tensor([0, 1]), own, reduce_positives=reduce).backward()
    assert anchors.grad.isfinite().all()


def test_ignored_anchors_have_no_gradient():
    anchors, labels, keys, filled = draw_bank(30)
    anchors.requires_grad_()
    ops.class_contrast_loss(anchors, labels, keys, filled, .3).backward()
    ignored = labels == 255
    assert 0 < ignored.sum() < 30
    assert anchors.grad[ignored].eq(0).all()
    there = filled.any(1)[labels.clamp(max=3)] & ~ignored
    assert anchors.grad[there].abs().sum(1).gt(0).all()
    # A label that is a class can be the one that is ignored.
    once = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, ignore_index=0)
    other = labels.where(labels > 0, torch.tensor(255)).where(
        labels != 255, torch.tensor(7))
    torch.testing.assert_close(once, ops.class_contrast_loss(
        anchors, other, keys, filled, .3))


def test_a_nan_shows():
    anchors, labels, keys, filled = draw_bank()
    bad = anchors.clone()
    labels[2] = 0
    bad[2, 0] = math.nan
    assert ops.class_contrast_loss(bad, labels, keys, filled, .3).isnan()
    assert ops.pair_contrast_loss(
        bad, keys[0], torch.ones(11, 3), .3).isnan()


# How it is done


def test_gradients_are_made_in_the_forward_and_kept():
    anchors, labels, keys, filled = draw_bank()
    anchors.requires_grad_()
    loss = ops.class_contrast_loss(anchors, labels, keys, filled, .3)
    node = loss.grad_fn.next_functions[0][0]
    kept = [one.shape for one in node.saved_tensors if one is not None]
    # Of the anchors' size: nothing of N x M, and no gradient of the bank.
    assert kept == [anchors.shape]
    first, = torch.autograd.grad(2 * loss, anchors, retain_graph=True)
    again, = torch.autograd.grad(loss, anchors)
    torch.testing.assert_close(first, 2 * again)


def test_a_second_derivative_is_refused():
    anchors, labels, keys, filled = draw_bank()
    anchors.requires_grad_()
    loss = ops.class_contrast_loss(anchors, labels, keys, filled, .3)
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(loss, anchors, create_graph=True)


def test_without_gradients_none_are_computed(monkeypatch):
    anchors, labels, keys, filled = draw_bank()
    relation = draw_relation(11, 3)
    want = ops.class_contrast_loss(anchors, labels, keys, filled, .3)
    pairs = ops.pair_contrast_loss(anchors, keys[0], relation, .3)
    monkeypatch.setattr(contrast_keys, 'gradients_of', None)
    for one in (anchors, anchors.clone().requires_grad_()):
        with torch.no_grad():
            assert ops.class_contrast_loss(
                one, labels, keys, filled, .3) == want
            assert ops.pair_contrast_loss(
                one, keys[0], relation, .3) == pairs
    assert not want.requires_grad


@pytest.mark.parametrize('form', ['class', 'pair'])
def test_no_more_than_a_chunk_exists_at_a_time(form, monkeypatch):
    largest = []
    original = contrast_keys.contrast_terms

    def watched(energies, positives, *args):
        largest.append(len(positives))
        return original(energies, positives, *args)

    monkeypatch.setattr(contrast_keys, 'contrast_terms', watched)
    monkeypatch.setattr(contrast_keys, 'CLASS_FORM_ELEMENTS', 60)
    monkeypatch.setattr(contrast_keys, 'PAIR_FORM_ELEMENTS', 60)
    anchors, labels, keys, filled = draw_bank()
    if form == 'class':
        ops.class_contrast_loss(anchors, labels, keys, filled, .3)
    else:
        ops.pair_contrast_loss(
            anchors, keys.flatten(0, 1), torch.ones(11, 12), .3)
    assert largest == [5, 5, 1]


@pytest.mark.parametrize('change, message', [
    (dict(own='both'), "own = 'both'"),
    (dict(reduce_positives='sum'), "reduce_positives = 'sum'"),
    (dict(energy='max'), "energy = 'max' must be 'mean' or 'lse'"),
    (dict(tau=0.), 'tau = 0.0 must be above 0'),
    (dict(base_tau=-1.), 'base_tau = -1.0 must be above 0'),
    (dict(chunk_size=0), 'chunk_size = 0 must be at least 1'),
    (dict(reduce_positives='lse', key_weights=torch.ones(4, 3)),
     "'lse' makes one positive of all")])
def test_mistakes_are_named(change, message):
    anchors, labels, keys, filled = draw_bank()
    with pytest.raises(ValueError, match=message):
        ops.class_contrast_loss(
            anchors, labels, keys, filled, **{'tau': .1, **change})
    if 'energy' not in change:
        change = {'tau': .1, **change}
        change.pop('key_weights', None)
        if len(change) == 1 or 'lse' in change.values():
            change['key_weights'] = torch.ones(3)
        if change['tau'] == .1 and set(change) == {'tau', 'key_weights'}:
            return
        with pytest.raises(ValueError, match=message):
            ops.pair_contrast_loss(
                anchors, keys[0], torch.ones(11, 3), **change)


def test_nothing_asks_for_a_value(monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    anchors, labels, keys, filled = (t.to('meta') for t in draw_bank())
    leaves = [anchors, keys, anchors[:, 0].clone(), keys[..., 0].clone()]
    anchors, keys, a, b = (one.requires_grad_() for one in leaves)
    loss = ops.class_contrast_loss(
        anchors, labels, keys, filled, .1, energy='mean', anchor_weights=a,
        key_weights=b, chunk_size=4)
    loss = loss + ops.class_contrast_loss(
        anchors, labels, keys, filled, .1, own='energy', chunk_size=4)
    ids = torch.arange(12, device='meta')
    for rule in (ops.same_label(labels, ids),
                 ops.same_label_across_images(labels, labels, ids, ids)):
        loss = loss + ops.pair_contrast_loss(
            anchors, keys.flatten(0, 1), rule, .1, exclude_self=True,
            anchor_weights=a, key_weights=b.flatten(), chunk_size=4)
    loss.backward()
    assert anchors.grad.shape == (11, 5) and keys.grad.shape == (4, 3, 5)


def test_chunks_are_larger_on_a_gpu():
    elements, columns = 2**21, 1000
    on_cpu, on_gpu = (anchors_at_once(
        None, elements, columns, torch.device(kind))
        for kind in ('cpu', 'cuda'))
    assert (on_cpu, on_gpu) == (2097, 8388)
    assert anchors_at_once(5, elements, columns, torch.device('cuda')) == 5
