"""Synthetic negatives: one more energy of each anchor, and who makes it."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_contrast import ops

ABSENT = -math.inf
EXACT = dict(rtol=1e-11, atol=1e-12)
CLASSES, WIDTH = 4, 5
SIZES = dict(num_classes=CLASSES, channels=WIDTH)
OWN = ('energy', 'positive')
BANKS = dict(
    prototypes=dict(type='PrototypeBank', normalize=True),
    several=dict(type='PrototypeBank', prototypes=3, compare='prototype'),
    gaussian=dict(type='GaussianBank'),
    pixels=dict(type='PixelQueue', length=7, number=3),
    means=dict(type='SegmentQueue', length=7, energy='mean'),
    tokens=dict(type='PrototypeTokens', prototypes=2),
    batch=dict(type='BatchBank'))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(
        shape, generator=generator(seed), dtype=torch.float64), dim=-1)


def draw(count, seed=0):
    labels = torch.randint(
        0, CLASSES + 1, (count, ), generator=generator(seed))
    labels[labels == CLASSES] = 255
    return unit(count, WIDTH, seed=seed + 1), labels


def build(kind):
    bank = MODELS.build({**SIZES, **BANKS[kind]}).double()
    for seed in range(4):
        vectors, labels = draw(40, seed)
        if seed < 2:  # a class that is not yet known
            labels = labels.where(labels != 2, 255)
        bank.update(vectors, labels, torch.rand(
            40, generator=generator(seed)), torch.arange(40) % 2, 2)
    return bank


def logsumexp(values):
    return math.log(sum(math.exp(v) for v in values)) if values else ABSENT


# The kernel


def draw_extra(count):
    extra = torch.randn(count, generator=generator(3)).double()
    extra[::3] = ABSENT
    return extra


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('reduce', ['mean', 'lse'])
def test_one_more_energy_joins_the_denominator(own, reduce):
    energies = torch.randn(6, 3, generator=generator(0)).double()
    positives = torch.randn(6, 2, generator=generator(1)).double()
    energies[:, 2], positives[1, 1], positives[2] = ABSENT, ABSENT, ABSENT
    labels = torch.tensor([0, 1, 0, 255, 1, 0])
    extra = draw_extra(6)
    got = ops.contrast_loss(energies, positives, labels, own,
                            reduce_positives=reduce, extra=extra)
    each = []
    for i, y in enumerate(labels.tolist()):
        there = [p for p in positives[i].tolist() if p > ABSENT]
        if y == 255 or not there:
            continue
        others = [energies[i, 1 - y].item()]
        others += [extra[i].item()] * bool(extra[i] > ABSENT)
        if reduce == 'lse':
            there = [logsumexp(there)]
        each.append(sum(logsumexp([
            energies[i, y].item() if own == 'energy' else p, *others]) - p
            for p in there) / len(there))
    assert got.item() == pytest.approx(sum(each) / len(each), rel=1e-12)
    # Without, it is the loss without.
    none = torch.full((6, ), ABSENT).double()
    plain = ops.contrast_loss(
        energies, positives, labels, own, reduce_positives=reduce)
    assert ops.contrast_loss(energies, positives, labels, own,
                             reduce_positives=reduce, extra=none) == plain
    assert got != plain


@pytest.mark.parametrize('chunk', [1, 4, None])
@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('energy', ['lse', 'mean'])
def test_chunks_take_one_more_energy(energy, own, chunk):
    anchors, labels = draw(11)
    keys = unit(CLASSES, 3, WIDTH, seed=5)
    filled = torch.rand(CLASSES, 3, generator=generator(2)) < .8
    extra = draw_extra(11)
    weights = torch.rand(11, generator=generator(4)).double()
    leaves = [one.requires_grad_() for one in (
        anchors, keys, extra, weights)]
    whole = ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, .3, energy),
        ops.bank_positives(anchors, labels, keys, filled, .3), labels, own,
        anchor_weights=weights, extra=extra)
    chunked = ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, own=own, energy=energy,
        anchor_weights=weights, chunk_size=chunk, extra=extra)
    found = [(whole, chunked)]
    if energy == 'lse':
        key_labels = torch.where(
            filled, torch.arange(CLASSES).unsqueeze(1), 255).flatten()
        found.append((whole, ops.pair_contrast_loss(
            anchors, keys.flatten(0, 1), ops.same_label(labels, key_labels),
            .3, own=own, anchor_weights=weights, chunk_size=chunk,
            extra=extra)))
    for want, got in found:
        torch.testing.assert_close(got, want, **EXACT)
        for a, b in zip(
                torch.autograd.grad(got, leaves),
                torch.autograd.grad(want, leaves, retain_graph=True),
                strict=True):
            torch.testing.assert_close(a, b, **EXACT)
            assert a.isfinite().all() and a.abs().sum() > 0


def test_gradients_of_one_more_energy():
    anchors, labels = draw(6)
    labels[0], labels[1] = 1, 1
    keys, filled = unit(4, 2, WIDTH, seed=1), torch.ones(4, 2).bool()
    extra = torch.randn(6, generator=generator(3)).double()
    inputs = [anchors.requires_grad_(), extra.requires_grad_()]
    key_labels = torch.arange(4).repeat_interleave(2)
    for own in OWN:
        assert torch.autograd.gradcheck(
            lambda f, e, own=own: ops.class_contrast_loss(
                f, labels, keys, filled, .5, own=own, chunk_size=4,
                extra=e), inputs)
        assert torch.autograd.gradcheck(
            lambda f, e, own=own: ops.pair_contrast_loss(
                f, keys.flatten(0, 1), ops.same_label(labels, key_labels),
                .5, own=own, chunk_size=4, extra=e), inputs)


@pytest.mark.parametrize('count, places', [(0, 3), (4, 0)])
def test_nothing_to_compare_is_zero_and_connected(count, places):
    anchors = unit(count, WIDTH).requires_grad_()
    extra = torch.full((count, ), ABSENT).double().requires_grad_()
    loss = ops.pair_contrast_loss(
        anchors, unit(places, WIDTH), torch.ones(count, places), .1,
        extra=extra)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (anchors, extra)):
        assert grad.eq(0).all()


def test_a_nan_shows():
    anchors, labels = draw(6)
    labels[0] = 1
    extra = draw_extra(6)
    extra[0] = math.nan
    keys, filled = unit(4, 2, WIDTH, seed=1), torch.ones(4, 2).bool()
    assert ops.class_contrast_loss(
        anchors, labels, keys, filled, .1, extra=extra).isnan()


# The hardest


@pytest.mark.parametrize('number', [1, 3, 30])
@pytest.mark.parametrize('chunk', [2, None])
def test_the_hardest_negatives_equal_the_loops(number, chunk):
    anchors, labels = draw(9)
    keys, key_labels = draw(14, 5)
    labels[0], key_labels[3] = 255, 255
    index, count = ops.hardest_negatives(
        anchors, keys, ops.same_label(labels, key_labels), number, chunk)
    assert index.shape == (9, number) and index.lt(14).all()
    for i in range(9):
        there = [j for j in range(14) if 255 not in (
            labels[i].item(), key_labels[j].item())
            and labels[i] != key_labels[j]]
        there.sort(key=lambda j: -(anchors[i] @ keys[j]).item())
        assert count[i] == min(number, len(there))
        assert index[i, :count[i]].tolist() == there[:number]


def slow_mixes(anchor, hard, draws, mixes, query_mixes, share):
    """The synthetic negatives of one anchor."""
    u = draws.tolist()
    every = []
    for m in range(mixes):
        i, j = (hard[int(u[m + part * mixes] * len(hard))]
                for part in (0, 1))
        a = u[m + 2 * mixes]
        every.append(a * i + (1 - a) * j)
    for m in range(query_mixes):
        k = hard[int(u[3 * mixes + m] * len(hard))]
        b = share * u[3 * mixes + query_mixes + m]
        every.append(b * anchor + (1 - b) * k)
    return [one / one.norm() for one in every]


@pytest.mark.parametrize('kind', BANKS)
@pytest.mark.parametrize('hardest', [2, 6, 50])
def test_mixes_equal_the_loops(kind, hardest):
    bank = build(kind)
    mixing = MODELS.build(dict(
        type='HardNegativeMixing', hardest=hardest, mixes=3, query_mixes=2,
        max_query_share=.4))
    anchors, labels = draw(10, 7)
    labels[0] = 255
    anchors.requires_grad_()
    draws = mixing.draw(10, generator(1)).double()
    assert draws.shape == (10, 13)
    keys, key_labels = (anchors, labels) if kind == 'batch' else (
        bank.entries())
    if kind == 'prototypes':
        assert len(keys) == CLASSES  # fewer than are asked for
    keys = keys.detach()
    want = []
    for i, y in enumerate(labels.tolist()):
        there = [j for j, c in enumerate(key_labels.tolist())
                 if 0 <= c < CLASSES and c != y] if y < CLASSES else []
        there.sort(key=lambda j: -(anchors[i] @ keys[j]).item())
        want.append(torch.stack([
            one @ anchors[i] / .2 for one in slow_mixes(
                anchors[i].detach(), [keys[j] for j in there[:hardest]],
                draws[i], 3, 2, .4)]).logsumexp(0)
            if there else anchors[i].sum() * 0 + ABSENT)
    want = torch.stack(want)
    assert want.isfinite().sum() >= 7 and want[0] == ABSENT
    if kind == 'batch':
        got = mixing(anchors, anchors, ops.same_label(
            labels, labels), .2, draws)
    else:
        got = bank.mixed(anchors, labels, .2, mixing, draws)
    torch.testing.assert_close(got, want, **EXACT)
    # The gradient is that of the anchor, not that of the mixes.
    finite = want.isfinite()
    torch.testing.assert_close(
        *(torch.autograd.grad(one.where(finite, torch.zeros(())).sum(),
                              anchors, retain_graph=True)[0]
          for one in (got, want)), **EXACT)
    loss = bank.loss(anchors, labels, .2, 'energy', .1, 'lse',
                     mixing=mixing, draws=draws)
    grad, = torch.autograd.grad(loss, anchors, retain_graph=True)
    assert grad.isfinite().all() and grad[0].eq(0).all()
    plain = bank.loss(anchors, labels, .2, 'energy', .1, 'lse')
    assert loss > plain + .01
    # Nor have keys of the batch, or learnt ones, a gradient by it.
    total = got.where(finite, torch.zeros(())).sum()
    if kind == 'tokens':
        assert torch.autograd.grad(
            total, bank.tokens, allow_unused=True) == (None, )


@pytest.mark.parametrize('kind', BANKS)
def test_the_loss_has_the_mixes_in_its_denominator(kind):
    bank = build(kind)
    mixing = MODELS.build(dict(type='HardNegativeMixing', hardest=4))
    anchors, labels = draw(10, 7)
    draws = mixing.draw(10, generator(1))
    got = bank.loss(anchors, labels, .2, 'positive', mixing=mixing,
                    draws=draws)
    if kind == 'batch':
        rule = ops.same_label(labels, labels)
        want = ops.pair_contrast_loss(
            anchors, anchors, rule, .2, exclude_self=True,
            extra=mixing(anchors, anchors, rule, .2, draws))
    else:
        extra = bank.mixed(anchors, labels, .2, mixing, draws)
        energies = bank.energies(anchors, .2)
        positives = bank.positives(anchors, labels, .2)
        if kind == 'several':
            energies = ops.prototype_energies(
                anchors, bank.mean.flatten(0, 1), .2,
                (bank.count > 0).flatten())
            labels = bank.assigned(anchors, labels, True)
            positives = ops.own_class(energies, labels, -1)
        want = ops.contrast_loss(energies, positives, labels, 'positive',
                                 255 if kind != 'several' else -1,
                                 extra=extra)
    torch.testing.assert_close(got, want, **EXACT)


def test_mixes_are_of_negatives_of_the_scope():
    # Of the own image only, and not of the anchor itself.
    bank = MODELS.build(dict(type='BatchBank', scope='image', **SIZES))
    mixing = MODELS.build(dict(
        type='HardNegativeMixing', hardest=9, mixes=4, query_mixes=0))
    anchors, labels = unit(6, WIDTH), torch.tensor([0, 0, 1, 0, 0, 1])
    images = torch.tensor([0, 0, 0, 1, 1, 1])
    draws = mixing.draw(6, generator(0))
    got = bank.loss(anchors, labels, .1, 'positive', images=images,
                    mixing=mixing, draws=draws)
    total = 0.
    for i, j, k in ((0, 1, 2), (1, 0, 2), (3, 4, 5), (4, 3, 5)):
        s = (anchors @ anchors[i] / .1).tolist()
        # All mixes of a single negative are that negative.
        total += logsumexp([s[j], *[s[k]] * 5]) - s[j]
    assert got.item() == pytest.approx(total / 4, rel=1e-6)
    # With a teacher's relations an anchor would be its own negative.
    taught = MODELS.build(dict(
        type='BatchBank', rule='teacher_topk', k=1, **SIZES))
    got = taught.loss(anchors[:2], labels[:2], .1, 'positive',
                      teacher=anchors[:2], mixing=mixing, draws=draws[:2])
    assert got == 0


def test_draws_are_the_generator_s():
    mixing = MODELS.build(dict(type='HardNegativeMixing'))
    assert (mixing.hardest, mixing.mixes, mixing.query_mixes,
            mixing.max_query_share) == (32, 16, 16, .5)
    first = mixing.draw(5, generator(3))
    torch.manual_seed(8)
    assert torch.equal(first, mixing.draw(5, generator(3)))
    assert first.shape == (5, 80) and not mixing.state_dict()
    assert first.min() >= 0 and first.max() < 1


def test_mixes_of_half_precision_are_full_precision():
    bank = build('pixels').float()
    mixing = MODELS.build(dict(type='HardNegativeMixing', hardest=4))
    anchors, labels = draw(10, 7)
    draws = mixing.draw(10, generator(1))
    half = anchors.bfloat16()
    full = bank.mixed(half.float(), labels, .1, mixing, draws)
    with torch.autocast('cpu', torch.bfloat16):
        for one in (half, half.float()):
            got = bank.mixed(one, labels, .1, mixing, draws)
            assert got.dtype == torch.float32 and torch.equal(got, full)
    anchors, keys = unit(9, WIDTH).float(), unit(300, WIDTH, seed=1).float()
    rule = ops.same_label(torch.zeros(9), torch.ones(300))
    index, _ = ops.hardest_negatives(anchors, keys, rule, 50)
    with torch.autocast('cpu', torch.bfloat16):
        again, _ = ops.hardest_negatives(anchors, keys, rule, 50)
    assert torch.equal(index, again)


@pytest.mark.parametrize('change, message', [
    (dict(hardest=0), 'HardNegativeMixing.hardest must be at least 1'),
    (dict(mixes=-1), 'mixes and query_mixes must be at least 0'),
    (dict(mixes=0, query_mixes=0), 'not both 0, got 0 and 0'),
    (dict(max_query_share=0.), r'max_query_share must lie in \(0, 1\]')])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='HardNegativeMixing', **change))
    mixing = MODELS.build(dict(type='HardNegativeMixing'))
    anchors, labels = draw(5)
    with pytest.raises(ValueError, match='HardNegativeMixing needs draws'):
        build('pixels').loss(
            anchors, labels, .1, 'energy', mixing=mixing)


@pytest.mark.parametrize('kind', ['empty', 'pixels', 'batch'])
def test_no_negative_is_no_energy(kind):
    mixing = MODELS.build(dict(type='HardNegativeMixing', hardest=3))
    anchors = unit(4, WIDTH).requires_grad_()
    labels = torch.ones(4).long()
    bank = MODELS.build({**SIZES, **BANKS['pixels']}).double()
    if kind == 'pixels':  # of this class only
        bank.update(unit(9, WIDTH), torch.ones(9).long(), torch.rand(9))
    if kind == 'batch':
        bank = MODELS.build(dict(type='BatchBank', **SIZES))
        assert bank.mixed(anchors, labels, .1, mixing, mixing.draw(
            4, generator(0))).eq(ABSENT).all()
    loss = bank.loss(anchors, labels, .1, 'positive', mixing=mixing,
                     draws=mixing.draw(4, generator(0)))
    grad, = torch.autograd.grad(loss, anchors)
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize('kind', BANKS)
def test_nothing_asks_for_a_value(kind, monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    bank = MODELS.build({**SIZES, **BANKS[kind]}).to('meta')
    mixing = MODELS.build(dict(type='HardNegativeMixing', hardest=3))
    anchors, labels = (one.to('meta') for one in draw(9))
    anchors = anchors.float().requires_grad_()
    bank.loss(anchors, labels, .1, 'positive', .07, mixing=mixing,
              draws=mixing.draw(9, generator(0), 'meta')).backward()
    assert anchors.grad.shape == (9, WIDTH)
    bank.centres()
