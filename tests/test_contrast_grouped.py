"""Blocks of one class, and the contrast with class means that uses them."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_contrast import ops
from mmseg_contrast.ops import contrast_means

ABSENT = -math.inf
EXACT = dict(rtol=1e-12, atol=1e-12)
OWN = ('energy', 'positive')


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(
        torch.randn(shape, generator=generator(seed), dtype=dtype), dim=-1)


# The layout


def slow_blocks(labels, classes, size, ignore=255):
    """Class after class, a block after the other: ``(class, indices)``."""
    blocks = []
    for c in range(classes):
        mine = [i for i, y in enumerate(labels.tolist())
                if y == c and y != ignore]
        for start in range(0, len(mine), size):
            blocks.append((c, mine[start:start + size]))
    return blocks


def check_layout(labels, classes, size, ignore=255):
    index, exists, owner = ops.blocks_of_classes(
        labels, classes, size, ignore)
    want = slow_blocks(labels, classes, size, ignore)
    blocks = len(index)
    assert index.shape == exists.shape == (blocks, size)
    assert owner.shape == (blocks, ) and len(want) <= blocks
    # Whatever is gathered for a free slot must be there.
    assert not exists.any() or index.lt(len(labels)).all()
    assert index.ge(0).all() and index[~exists].eq(0).all()
    assert owner.ge(0).all() and owner.lt(classes).all()
    for k in range(blocks):
        c, mine = want[k] if k < len(want) else (owner[k].item(), [])
        assert owner[k] == c
        assert index[k][exists[k]].tolist() == mine
        # A block is filled from the front.
        assert exists[k].tolist() == [j < len(mine) for j in range(size)]
    return blocks - len(want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(labels=st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 9, 255]),
                       max_size=40),
       classes=st.integers(1, 5), size=st.integers(1, 9),
       ignore=st.sampled_from([255, 1]))
def test_blocks_equal_the_loop(labels, classes, size, ignore):
    labels = torch.tensor(labels, dtype=torch.int64)
    check_layout(labels, classes, size, ignore)
    index, exists, _ = ops.blocks_of_classes(labels, classes, size, ignore)
    # Each vector of a class once, and no other.
    known = ops.known_labels(labels, classes, ignore).nonzero().flatten()
    assert index[exists].sort().values.tolist() == known.tolist()


@pytest.mark.parametrize('number, classes, size, blocks', [
    (11, 4, 3, 6), (4, 4, 3, 4), (3, 4, 3, 3), (1, 4, 3, 1), (0, 4, 3, 0),
    (32768, 19, 256, 146), (32768, 19, 64, 530), (7, 2, 1, 7)])
def test_shapes_follow_from_the_numbers_alone(number, classes, size, blocks):
    for labels in (torch.full((number, ), 255),
                   torch.zeros(number, dtype=torch.int64),
                   torch.arange(number) % classes):
        index, exists, owner = ops.blocks_of_classes(labels, classes, size)
        assert index.shape == exists.shape == (blocks, size)
        assert owner.shape == (blocks, )


@pytest.mark.parametrize('size', [2, 3, 5])
@pytest.mark.parametrize('full', [0, 1, 2])
def test_the_labels_that_need_most_blocks_have_enough(size, full):
    # One vector more than full blocks in each class wastes most.
    labels = torch.arange(4).repeat(full * size + 1)
    assert check_layout(labels, 4, size) == 0
    # And the rest of the last class has no place to hide.
    assert check_layout(torch.cat([labels, labels[:1]]), 4, size) == 0


def test_the_layout_asks_for_no_value():
    labels = torch.zeros(11, dtype=torch.int64, device='meta')
    index, exists, owner = ops.blocks_of_classes(labels, 4, 3)
    assert index.shape == exists.shape == (6, 3) and owner.shape == (6, )
    assert index.dtype == owner.dtype == torch.int64
    assert exists.dtype == torch.bool


# The loss


def draw(count=60, classes=5, length=4, width=6, seed=0):
    """Unequal classes, of which one has no anchor and one no key."""
    anchors = unit(count, width, seed=seed)
    keys = unit(classes, length, width, seed=seed + 1)
    filled = torch.rand(classes, length, generator=generator(seed + 2)) < .7
    filled[0], filled[1] = True, False
    keys[~filled] = 1e3  # what an empty place holds must not matter
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 4, 255, -1])[torch.randint(
        0, 10, (count, ), generator=generator(seed + 3))]
    return anchors, labels, keys, filled


def draw_more(count, classes=5, length=4):
    """Weights of anchors and keys, and one more energy."""
    extra = torch.randn(count, generator=generator(6)).double()
    extra[2] = ABSENT
    return (torch.rand(count, generator=generator(4)).double(),
            torch.rand(classes, length, generator=generator(5)).double(),
            extra)


def dense(anchors, labels, keys, filled, own, reduce='mean', a=None, b=None,
          extra=None):
    ids = labels.clamp(0, len(filled) - 1)
    return ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, .3, 'mean'),
        ops.bank_positives(anchors, labels, keys, filled, .3), labels, own,
        reduce_positives=reduce, anchor_weights=a,
        positive_weights=None if b is None else b[ids], extra=extra)


def blocked(anchors, labels, keys, filled, own, reduce='mean', a=None,
            b=None, extra=None, chunk=None):
    return ops.class_contrast_loss(
        anchors, labels, keys, filled, .3, own=own, reduce_positives=reduce,
        energy='mean', anchor_weights=a, key_weights=b, extra=extra,
        chunk_size=chunk)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('chunk', [1, 7, 16, 40, None])
def test_blocks_equal_the_dense_loss(chunk, own, weighted):
    anchors, labels, keys, filled = draw()
    more = draw_more(60) if weighted else ()
    leaves = [one.requires_grad_() for one in (anchors, keys, *more)]
    got = blocked(
        anchors, labels, keys, filled, own, 'mean', *more, chunk=chunk)
    want = dense(anchors, labels, keys, filled, own, 'mean', *more)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(torch.autograd.grad(got, leaves),
                    torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert a.isfinite().all() and a.abs().sum() > 0


@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('reduce', ['mean', 'lse'])
@pytest.mark.parametrize('sizes', [(1, 1), (3, 3), (16, 64)])
def test_the_size_of_a_block_does_not_matter(
        sizes, own, reduce, monkeypatch):
    for name, size in zip(('LEAST', 'LARGEST'), sizes, strict=True):
        monkeypatch.setattr(contrast_means, f'{name}_BLOCK', size)
    anchors, labels, keys, filled = draw()
    leaves = [anchors.requires_grad_(), keys.requires_grad_()]
    got = blocked(anchors, labels, keys, filled, own, reduce)
    want = dense(anchors, labels, keys, filled, own, reduce)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(torch.autograd.grad(got, leaves),
                    torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize('own', OWN)
def test_gradients_of_everything_at_once(own):
    anchors, labels, keys, filled = draw(9)
    a, b, extra = draw_more(9)
    inputs = [one.requires_grad_() for one in (anchors, keys, a, b)]
    inputs.append(torch.randn(
        9, generator=generator(7)).double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda f, k, a, b, e: blocked(
            f, labels, k, filled, own, 'mean', a, b, e, chunk=4), inputs)


def test_each_gradient_is_there_without_the_others():
    anchors, labels, keys, filled = draw()
    values = dict(zip(('anchors', 'keys', 'a', 'b', 'extra'), (
        anchors, keys, *draw_more(60)), strict=True))

    def loss(form, leaves):
        return form(
            leaves['anchors'], labels, leaves['keys'], filled, 'positive',
            'mean', leaves['a'], leaves['b'], leaves['extra'])

    for name in values:
        leaves = {other: value.detach().clone().requires_grad_(
            other == name) for other, value in values.items()}
        value = loss(blocked, leaves)
        kept = value.grad_fn.next_functions[0][0].saved_tensors
        assert sum(one is not None for one in kept) == 1
        got, = torch.autograd.grad(value, leaves[name])
        want, = torch.autograd.grad(loss(dense, leaves), leaves[name])
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize('count, places, ignored', [
    (0, 3, False), (4, 0, False), (4, 3, True), (0, 0, False)])
def test_nothing_to_compare_is_zero_and_connected(count, places, ignored):
    anchors, keys = unit(count, 5), unit(2, places, 5, seed=1)
    labels = torch.full((count, ), 255 if ignored else 0)
    filled = torch.ones(2, places, dtype=torch.bool)
    a, b, extra = (torch.ones(shape).double() for shape in (
        count, (2, places), count))
    leaves = [one.requires_grad_() for one in (anchors, keys, a, b, extra)]
    loss = blocked(anchors, labels, keys, filled, 'positive', 'mean', a, b,
                   extra)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.eq(0).all()


def test_a_bank_without_a_key_is_zero():
    anchors, labels, keys, filled = draw()
    loss = blocked(anchors.requires_grad_(), labels, keys,
                   torch.zeros_like(filled), 'positive')
    loss.backward()
    assert loss.item() == 0 and anchors.grad.eq(0).all()


def test_ignored_anchors_are_not_looked_at():
    # The first is what a free slot gathers.
    anchors, labels, keys, filled = draw()
    labels[0] = labels[7] = 255
    want = blocked(anchors, labels, keys, filled, 'positive')
    bad = anchors.clone()
    bad[0], bad[7] = math.nan, math.inf
    bad.requires_grad_()
    got = blocked(bad, labels, keys, filled, 'positive')
    got.backward()
    assert got == want
    assert bad.grad[[0, 7]].eq(0).all() and bad.grad.isfinite().all()
    labels[0] = 0
    assert blocked(bad, labels, keys, filled, 'positive').isnan()


def test_precision_is_that_of_float32():
    anchors, labels, keys, filled = draw()
    keys[~filled] = 0.
    # Exact in half precision, so that only the kernel could lose digits.
    anchors, keys = anchors.bfloat16().float(), keys.half().float()
    leaf = anchors.clone().requires_grad_()
    full = blocked(leaf, labels, keys, filled, 'positive')
    grad, = torch.autograd.grad(full, leaf)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = blocked(leaf, labels, keys, filled, 'positive')
    assert mixed.dtype == torch.float32 and torch.equal(mixed, full)
    assert torch.equal(torch.autograd.grad(mixed, leaf)[0], grad)
    half = anchors.bfloat16().requires_grad_()
    narrow = blocked(half, labels, keys.half(), filled, 'positive')
    assert torch.equal(narrow, full)
    wide = blocked(anchors.double(), labels, keys.double(), filled,
                   'positive')
    assert full.item() == pytest.approx(wide.item(), rel=2e-6)


# How it is done


def test_only_similarities_with_the_own_class_are_computed(monkeypatch):
    rows = []
    original = contrast_means.contrast_terms

    def watched(energies, positives, *args):
        assert energies.shape[1] == 5 and positives.shape[1] == 4
        rows.append(len(positives))
        return original(energies, positives, *args)

    monkeypatch.setattr(contrast_means, 'contrast_terms', watched)
    anchors, labels, keys, filled = draw()
    blocked(anchors, labels, keys, filled, 'positive')
    # 60 anchors in blocks of 16, and at most one more of each class.
    assert rows == [16 * ((60 + 5 * 15) // 16)]
    rows.clear()
    blocked(anchors, labels, keys, filled, 'positive', chunk=40)
    assert rows == [32, 32, 32, 32]
    rows.clear()
    # Blocks become smaller than a chunk.
    blocked(anchors, labels, keys, filled, 'positive', chunk=7)
    assert rows == [7] * ((60 + 5 * 6) // 7)
    rows.clear()
    monkeypatch.setattr(
        contrast_means, 'MEAN_FORM_ELEMENTS', 33 * (40 + 18 + 3))
    blocked(anchors, labels, keys, filled, 'positive')
    assert rows == [32, 32, 32, 32]


def test_without_gradients_none_are_computed(monkeypatch):
    anchors, labels, keys, filled = draw()
    want = blocked(anchors, labels, keys, filled, 'positive')
    monkeypatch.setattr(contrast_means, 'gradients_of', None)
    with torch.no_grad():
        assert blocked(anchors.requires_grad_(), labels, keys, filled,
                       'positive') == want


def test_it_asks_for_no_value(monkeypatch):
    # Meta tensors have none. autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    anchors, labels, keys, filled = (one.to('meta') for one in draw())
    a, b, extra = (one.to('meta') for one in draw_more(60))
    leaves = [one.requires_grad_() for one in (anchors, keys, a, b, extra)]
    blocked(anchors, labels, keys, filled, 'positive', 'mean', a, b, extra,
            chunk=20).backward()
    for one in leaves:
        assert one.grad.shape == one.shape
