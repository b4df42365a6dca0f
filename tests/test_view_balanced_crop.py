"""The class-balanced crop, against loops and slices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import CLASSES, batch, build, dacs_parts, run, total
from mmseg_contrast import ops
from mmseg_contrast.adaptation import BalancedCrop, View


def parts(policy='target_full', **crop):
    """DACS on crops of the target, labelled anew."""
    teach = dict(type='ConfidentFraction', threshold=0.3)
    return dacs_parts(
        pseudo_labels=dict(target_full=dict(teach, view='target'),
                           target=dict(teach, view='target_crop')),
        views=dict(
            target_crop=dict(type='BalancedCrop', pseudo_label=policy,
                             **{'size': (32, 32), **crop}),
            mixed=dict(type='ClassMix', target='target_crop'),
            mixed_strong=dict(type='StrongAugment', view='mixed')))


def wide_batch():
    """A target stream of larger images than the source."""
    data, wide = batch(), batch(size=(48, 64), seed=1)
    for key in ('inputs', 'data_samples'):
        data[key]['target'] = wide[key]['target']
    return data


# Scores


def slow_score(labels, max_ratio):
    pixels = [c for c in labels.flatten().tolist() if 0 <= c < CLASSES]
    counts = [pixels.count(c) for c in set(pixels)]
    if not pixels or max(counts) / len(pixels) >= max_ratio:
        return 0.
    return sum(math.log(count) for count in counts if count > 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4),
       st.integers(0, 2**31), st.sampled_from([0., .25, .5, .75, 1.]))
def test_counts_and_scores_equal_a_loop(
        height, width, tries, seed, max_ratio):
    gen = torch.Generator().manual_seed(seed)
    known = torch.tensor([*range(CLASSES), 0, 0, 255, 255, -1])
    labels = known[torch.randint(
        len(known), (3, height, width), generator=gen)]
    size = (1 + seed % height, 1 + seed % width)
    offsets = ops.draw_offsets(3, tries, height, width, size, gen)
    counts = ops.box_counts(labels, offsets, size, CLASSES)
    assert counts.shape == (3, tries, CLASSES)
    scores = ops.balance_scores(counts, max_ratio)
    for n in range(3):
        for t, (top, left) in enumerate(offsets[n].tolist()):
            box = labels[n, top:top + size[0], left:left + size[1]]
            assert counts[n, t].tolist() == [
                int((box == c).sum()) for c in range(CLASSES)]
            assert float(scores[n, t]) == pytest.approx(
                slow_score(box, max_ratio), rel=1e-6, abs=1e-6)


def test_scores_in_numbers():
    counts = torch.tensor([[4, 2, 1], [6, 2, 0], [1, 2, 0], [0, 0, 0]])
    found = ops.balance_scores(counts)
    # 6 of 8 is not below 0.75.
    assert found.tolist() == pytest.approx(
        [math.log(4 * 2), 0, math.log(2), 0])
    assert ops.balance_scores(counts, .8)[1] == pytest.approx(
        math.log(6 * 2))


# Windows


@pytest.mark.parametrize('middle', [(), (3, ), (2, 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.int64, torch.bool])
def test_windows_are_slices(middle, dtype):
    maps = torch.randint(0, 9, (3, *middle, 7, 9)).to(dtype)
    offsets = torch.tensor([[0, 0], [3, 4], [2, 1]])
    for layout in (maps, maps.transpose(0, -1).contiguous().transpose(0, -1)):
        found = ops.crop_windows(layout, offsets, (4, 5))
        assert found.dtype == dtype
        for one, part, (top, left) in zip(maps, found, offsets, strict=True):
            assert torch.equal(part, one[..., top:top + 4, left:left + 5])


# Boxes


def test_the_first_of_the_best_boxes_is_taken():
    labels = torch.zeros(2, 4, 12, dtype=torch.int64)
    labels[0, 2:, 4:6] = 1  # in the boxes at 4 and 2
    labels[0, 2:, 8:10] = 1
    labels[1, :, 11] = 1
    offsets = torch.tensor([[[0, 0], [0, 4], [0, 2], [0, 8]],
                            [[0, 3], [0, 0], [0, 5], [0, 8]]])
    chosen = ops.choose_offsets(labels, offsets, (4, 4), 2, max_ratio=.8)
    # A quarter is class 1, or nothing: 0.75 is then not below the limit.
    assert chosen.tolist() == [[0, 4], [0, 8]]
    chosen = ops.choose_offsets(labels, offsets, (4, 4), 2, max_ratio=.75)
    assert chosen.tolist() == [[0, 0], [0, 3]]


def test_chosen_boxes_score_as_the_best_of_a_loop():
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (4, 3, 5), generator=gen)
    labels = labels.repeat_interleave(6, 1).repeat_interleave(6, 2)
    offsets = ops.draw_offsets(4, 10, 18, 30, (9, 13), gen)
    chosen = ops.choose_offsets(labels, offsets, (9, 13), CLASSES, .6)
    for one, boxes, box in zip(labels, offsets, chosen, strict=True):
        scores = [slow_score(one[t:t + 9, left:left + 13], .6)
                  for t, left in boxes.tolist()]
        assert len(set(scores)) > 3
        assert box.tolist() == boxes[scores.index(max(scores))].tolist()


def test_every_place_is_equally_likely():
    gen = torch.Generator().manual_seed(0)
    offsets = ops.draw_offsets(2, 3000, 10, 7, (8, 4), gen)
    assert offsets.shape == (2, 3000, 2) and offsets.dtype == torch.int64
    counts = torch.bincount((offsets[..., 0] * 4 + offsets[..., 1]).flatten())
    assert len(counts) == 3 * 4
    assert (counts - 500).abs().max() < 110  # 5 deviations
    assert not torch.equal(offsets[0], offsets[1])
    whole = ops.draw_offsets(1, 2, 8, 4, (8, 4), gen)
    assert not whole.any()


def test_nothing_waits_for_the_device():
    """On 'meta' there is no value to wait for."""
    labels = torch.zeros(2, 9, 11, dtype=torch.int64, device='meta')
    offsets = torch.zeros(2, 10, 2, dtype=torch.int64, device='meta')
    chosen = ops.choose_offsets(labels, offsets, (4, 5), CLASSES)
    images = torch.zeros(2, 3, 9, 11, device='meta')
    assert ops.crop_windows(images, chosen, (4, 5)).shape == (2, 3, 4, 5)


# The view


def test_all_that_is_known_travels_with_the_crop():
    gen = torch.Generator().manual_seed(0)
    shape = (2, 6, 8)
    mask = torch.rand(shape, generator=gen) < .5
    scale = torch.tensor(.3)
    meta = dict(img_shape=(6, 8), pad_shape=(6, 8), img_path='a.png',
                padding_size=[0, 2, 0, 1], flip=True)
    view = View(
        name='target', images=torch.rand(2, 3, 6, 8, generator=gen),
        domain='target', labels=torch.randint(0, 5, shape, generator=gen),
        probs=torch.rand(2, 5, 6, 8, generator=gen),
        weights=torch.rand(shape, generator=gen),
        weight_parts=((scale, mask), ), valid=~mask, metas=[meta, {}],
        extras=dict(origin=mask), inputs=dict(part=1))
    crop = BalancedCrop(num_classes=5, size=(4, 4)).crop(
        view, torch.tensor([[1, 3], [2, 0]]), 'target_crop')
    assert crop.name == 'target_crop' and crop.domain == 'target'

    def cut(maps):
        return torch.stack([maps[0, ..., 1:5, 3:7], maps[1, ..., 2:6, :4]])

    for name in ('images', 'labels', 'probs', 'weights', 'valid'):
        assert torch.equal(getattr(crop, name), cut(getattr(view, name)))
    (kept, part), = crop.weight_parts
    assert kept is scale and torch.equal(part, cut(mask))
    assert torch.equal(crop.extras['origin'], cut(mask))
    assert crop.inputs == dict(part=1)
    assert crop.metas == [dict(
        img_shape=(4, 4), pad_shape=(4, 4), img_path='a.png',
        padding_size=(0, 0, 0, 0), flip=True), {}]
    assert meta['img_shape'] == (6, 8) and view.images.shape[2:] == (6, 8)


def test_a_crop_is_labelled_anew_and_mixed():
    model = build(**parts())
    model.keep_step = True
    losses = run(model, wide_batch())
    assert math.isfinite(float(total(losses).detach()))
    step = model.last_step
    assert step.view('mixed').images.shape == (2, 3, 32, 32)
    assert torch.equal(step.pseudo_label('target').labels,
                       step.teacher('ema', 'target_crop').argmax(1))
    # What it draws is a function of position and name.
    offsets = model.views['target_crop'].draw(
        2, 48, 64, step.generator('target_crop'))
    chosen = ops.choose_offsets(
        step.pseudo_label('target_full').labels, offsets, (32, 32), CLASSES)
    assert torch.equal(
        step.view('target_crop').images,
        ops.crop_windows(step.view('target').images, chosen, (32, 32)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r'model\.views\.target_crop\.size = '
                       r"\(32, 65\) does not fit into the view 'target' of "
                       '48 x 64 pixels'):
        run(build(**parts(size=(32, 65))), wide_batch())
    with pytest.raises(ValueError, match=r'views\.target_crop\.pseudo_label = '
                       "'no' is not in"):
        build(**parts('no'))
    # The labels of the crop can't choose the crop.
    with pytest.raises(ValueError, match='in a circle: '):
        build(**parts('target'))
    for wrong, key in ((dict(size=(0, 4)), 'size'), (dict(size=(4, )), 'size'),
                       (dict(size=(4, 4), tries=0), 'tries'),
                       (dict(size=(4, 4), max_ratio=1.1), 'max_ratio')):
        with pytest.raises(ValueError,
                           match=rf'model\.views\.target_crop\.{key}'):
            build(**parts(**wrong))
    with pytest.raises(ValueError, match='9 x 4 pixels does not fit into an '
                       'image of 8 x 8'):
        ops.draw_offsets(1, 1, 8, 8, (9, 4), torch.Generator())
