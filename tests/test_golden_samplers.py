"""Published samplers and drawn negatives, number by number.

tests/data/trim_samplers_golden.py says what is kept of the recording; its
draws are injected.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.registry import MODELS

from mmseg_contrast import ops

DATA = Path(__file__).resolve().parent / 'data'
CLASSES, WIDTH, SIDE = 6, 16, 24
EXACT = dict(rel=1e-10, abs=1e-13)


@pytest.fixture(scope='module')
def golden():
    stored = {}
    for name in ('contrast.npz', 'contrast_samplers.npz'):
        with np.load(DATA / name) as file:
            stored.update({key: torch.from_numpy(file[key])
                           for key in file.files
                           if file[key].dtype.kind != 'U'})
    return stored


def maps_of(golden, name, i):
    return golden[name][i].double() / 256


def small_labels(golden, i):
    return golden['label_src'][i].long()[:, ::4, ::4]


def flat(maps):
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def close(got, want):
    assert got.item() == pytest.approx(want.item(), **EXACT)


def same(got, want):
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * scale)


def check_gradient(golden, name, grad):
    close(grad.norm(), golden[f'{name}_norm'])
    same(grad[..., ::8, ::8], golden[f'{name}_s8'])
    same(grad.sum((2, 3)), golden[f'{name}_chsum'])


# Labels


@pytest.mark.parametrize('i', range(5))
def test_labels_at_a_feature_map(golden, i):
    labels = golden['label_src'][i].long()
    size = (SIDE, SIDE)
    ratio = ops.labels_at(labels, size, 'ratio', CLASSES, .75)
    assert torch.equal(ratio, golden['sepico/label_src_ratio'][i].long())
    for rule in ('nearest', 'stride'):
        assert torch.equal(ops.labels_at(labels, size, rule, CLASSES),
                           labels[:, ::4, ::4])


# ContrastiveSeg


@pytest.mark.parametrize('i, views', [(0, 12), (3, 11)])
def test_hard_and_easy_anchors(golden, i, views):
    run = f'cseg/no_memory_it{i}'
    labels = small_labels(golden, i)
    logits = maps_of(golden, 'logit_src', i)
    right = (logits.argmax(1) == labels).flatten()
    images = golden[f'{run}/anchor_image'].tolist()
    classes = golden[f'{run}/anchor_class'].long().tolist()
    draws = iter(golden[f'{run}/draws'].long().split(
        golden[f'{run}/draw_lengths'].tolist()))
    scores = torch.zeros(labels.numel())
    here = torch.arange(2).repeat_interleave(SIDE**2)
    for image, c in zip(images, classes, strict=True):
        mine = (here == image) & (labels.flatten() == c)
        for kind in (mine & ~right, mine & right):
            order = next(draws)
            pixels = kind.nonzero().flatten()
            assert len(pixels) == len(order)
            scores[pixels[order]] = torch.linspace(1, .1, len(order))
    assert next(draws, None) is None

    sampler = MODELS.build(
        dict(type='HardEasy', max_samples=128, max_views=12))
    anchors = sampler(labels, scores, logits, CLASSES)
    number = len(images) * views
    want = golden[f'{run}/anchor_pixel'] + SIDE**2 * golden[
        f'{run}/anchor_image'].unsqueeze(1)
    assert want.shape[1] == views
    assert torch.equal(anchors.index[:number], want.flatten())
    assert anchors.labels[:number].tolist() == [
        c for c in classes for _ in range(views)]
    assert anchors.labels[number:].eq(255).all()
    assert len(anchors.labels) == 128
    hard = ~right[anchors.index[:number]].view(-1, views)
    assert hard.sum(1).tolist() == golden[f'{run}/anchor_num_hard'].tolist()


# ReCo


@pytest.mark.parametrize('i', [0, 2])
def test_reco(golden, i):
    run = f'reco/it{i}'
    labels = small_labels(golden, i).where(
        golden[f'{run}/mask'].squeeze(1) > 0, torch.tensor(255))
    logits = maps_of(golden, 'logit_src', i)
    maps = maps_of(golden, 'feat_src', i).requires_grad_()
    valid = golden[f'{run}/valid_classes'].tolist()
    pixels = [(labels.flatten() == c).nonzero().flatten() for c in valid]
    assert [c for c in range(CLASSES) if (labels == c).any()] == valid

    # Scores that fall along the image give the pool in its order.
    sampler = MODELS.build(
        dict(type='Uncertain', number=1152, max_probability=.8))
    pool = sampler(labels, torch.linspace(1, 0, 1152), logits, CLASSES)
    queries, negatives = [], []
    for place, c in enumerate(valid):
        mine = pool.index[pool.labels == c]
        queries.append(mine[golden[f'{run}/draw_query'][place]])
        turned = [*range(place + 1, len(valid)), *range(place)]
        drawn = torch.cat([pixels[j] for j in turned])[
            golden[f'{run}/draw_negative_index'][place].long()]
        negatives.append(drawn)
        # Recorded numbers of classes are places in the turned list.
        theirs = torch.tensor(valid)[torch.tensor(turned)][
            golden[f'{run}/draw_negative_class'][place].long()]
        assert torch.equal(labels.flatten()[drawn].sort(1).values,
                           theirs.sort(1).values)
    features = flat(maps)
    count, means, _ = ops.class_moments(
        features.detach(), labels.flatten(), CLASSES)
    index = torch.cat(negatives)
    loss = ops.sampled_contrast_loss(
        features[torch.cat(queries)],
        torch.tensor(valid).repeat_interleave(16), means, count > 0,
        features, index, torch.ones_like(index, dtype=torch.bool), .5,
        chunk_size=7)
    close(loss, golden[f'{run}/loss'])
    grad, = torch.autograd.grad(loss, maps)
    check_gradient(golden, f'{run}/grad', grad)


# U2PL


def probabilities(golden, i):
    return (.6 * maps_of(golden, 'logit_src', i)).softmax(1)


def masks(golden, i):
    return [golden[f'u2pl/main/it{i}/{name}_mask'].squeeze(1) > 0
            for name in ('low', 'high')]


@pytest.mark.parametrize('i', range(4))
def test_entropy_percentiles(golden, i):
    # Image 0 is labelled: all of it counts. Image 1 has 20 and 80 percent.
    known = small_labels(golden, i) != 255
    entropy = ops.pixel_entropy(maps_of(golden, 'logit_src', i))
    low, high = masks(golden, i)
    assert torch.equal(low[0], known[0]) and torch.equal(high[0], known[0])
    under = ops.entropy_threshold(entropy[1], known[1], 20.)
    over = ops.entropy_threshold(entropy[1], known[1], 80.)
    assert torch.equal((entropy[1] <= under) & known[1], low[1])
    assert torch.equal((entropy[1] >= over) & known[1], high[1])


def queues_after(golden, i):
    """The published queues, and what ours would have added to them."""
    keys = torch.zeros(CLASSES, 10, WIDTH)
    pointer, filled = (torch.zeros(CLASSES).long() for _ in range(2))
    for j in range(i + 1):
        labels = small_labels(golden, j)
        members = ops.unreliable_class_members(
            probabilities(golden, j), labels, masks(golden, j)[1],
            torch.tensor([True, False]), 2, 5)
        # The published code asks for the label in addition.
        own = labels.unsqueeze(1) == torch.arange(CLASSES).view(1, -1, 1, 1)
        assert members[0].any() and not (members & own)[0].any()
        assert (members[1] & ~own[1]).any()
        vectors = flat(maps_of(golden, 'feat_teacher', j)).float()
        ops.push_members(
            keys, pointer, filled, vectors,
            (members & own).transpose(0, 1).flatten(1),
            torch.linspace(1, 0, 1152), 1152)
    return keys, pointer, filled


@pytest.mark.parametrize('i', range(4))
def test_queues_with_membership(golden, i):
    keys, pointer, filled = queues_after(golden, i)
    run = f'u2pl/main/it{i}'
    assert filled.tolist() == golden[f'{run}/queue_len'].tolist()
    want = golden[f'{run}/queue'].split(filled.tolist())
    for c in range(CLASSES):
        ages = (pointer[c] - filled[c] + torch.arange(filled[c])) % 10
        assert torch.equal(keys[c][ages], want[c])


@pytest.mark.parametrize('run', ['main/it0', 'main/it3'] + [
    f'main/it{i}/aligned_run' for i in range(4)])
def test_u2pl(golden, run):
    i, run = int(run[7]), f'u2pl/{run}'
    labels = small_labels(golden, i)
    low, _ = masks(golden, i)
    reliable = labels.where(low, torch.tensor(255)).flatten()
    keys, pointer, filled = queues_after(golden, i)
    maps = maps_of(golden, 'feat_src', i).requires_grad_()
    sampler = MODELS.build(dict(type='LowEntropy', percent=100.))
    sampler.number = 1152
    pool = sampler(reliable.view_as(labels), torch.linspace(1, 0, 1152),
                   .6 * maps_of(golden, 'logit_src', i), CLASSES)

    perm = golden.get(f'{run}/perm', torch.arange(CLASSES)).tolist()
    used = [c for c in perm if (pool.labels == c).any() and filled[c] > 0]
    draws = golden[f'{run}/draws'].long().split([16, 160] * len(used))
    queries, negatives = [], []
    for c, which, ages in zip(used, draws[::2], draws[1::2], strict=True):
        queries.append(pool.index[pool.labels == c][which])
        negatives.append(c * 10 + (
            pointer[c] - filled[c] + ages).view(16, 10) % 10)
    count, means, _ = ops.class_moments(
        flat(maps_of(golden, 'feat_teacher', i)), reliable, CLASSES)
    index = torch.cat(negatives)
    loss = ops.sampled_contrast_loss(
        flat(maps)[torch.cat(queries)],
        torch.tensor(used).repeat_interleave(16), means, count > 0,
        keys.flatten(0, 1).double(), index,
        torch.ones_like(index, dtype=torch.bool), .5)
    close(loss, golden[f'{run}/loss'])
    grad, = torch.autograd.grad(loss, maps)
    check_gradient(golden, f'{run}/grad', grad)
