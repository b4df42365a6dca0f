"""Boxes, fusion, block masks, label maps and feature distance, in loops."""

import itertools
import math

import pytest
import torch

from mmseg_contrast import ops

# Boxes


@pytest.mark.parametrize('side, crop, divisor', [
    (64, 32, 8), (70, 32, 8), (32, 32, 8), (39, 32, 8), (40, 32, 1)])
@pytest.mark.parametrize('include_last', [True, False])
def test_every_offset_of_the_grid_is_equally_likely(
        side, crop, divisor, include_last):
    margin = side - crop
    every = [o for o in range(margin + 1) if o % divisor == 0]
    if not include_last and divisor > 1 and (margin + 1) % divisor:
        # the published range: none beyond (margin + 1) // divisor - 1
        every = every[:-1] or [0]
    steps = 60 * len(every)
    found = [0] * (side + 1)
    for i in range(steps):
        top, bottom, left, right = ops.draw_crop_box(
            side, side + 8 * divisor, (crop, crop), ((i + .5) / steps, 0),
            divisor, include_last)
        assert (bottom - top, left, right) == (crop, 0, crop)
        found[top] += 1
    assert [o for o in range(side + 1) if found[o]] == every
    assert all(found[o] == 60 for o in every)


def test_both_directions_of_a_box_have_a_number_of_their_own():
    assert ops.draw_crop_box(48, 80, (16, 32), (.99, .5)) == (32, 48, 24, 56)


def test_a_crop_larger_than_the_image_is_a_clear_mistake():
    with pytest.raises(ValueError, match='64 x 32 pixels does not fit into '
                                         'an image of 48 x 128'):
        ops.draw_crop_box(48, 128, (64, 32), (0, 0))


def test_boxes_are_scaled_exactly_or_not_at_all():
    assert ops.scale_box((0, 16, 8, 24), 8) == (0, 2, 1, 3)
    with pytest.raises(ValueError, match='multiples of 8'):
        ops.scale_box((0, 16, 4, 24), 8)


def test_cropping_to_a_box_keeps_leading_dimensions():
    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(ops.crop_to_box(maps, (1, 3, 0, 4)),
                       maps[:, :, 1:3, :4])
    assert torch.equal(ops.crop_to_box(maps[0, 0], (1, 3, 0, 4)),
                       maps[0, 0, 1:3, :4])


@pytest.mark.parametrize('height, width, crop, stride', [
    (8, 8, (4, 4), (2, 2)), (9, 13, (4, 6), (3, 4)), (4, 9, (4, 4), (4, 4)),
    (3, 5, (4, 8), (2, 2)), (10, 4, (4, 4), (3, 1))])
def test_windows_cover_the_image_and_stay_inside(height, width, crop, stride):
    boxes = ops.slide_boxes(height, width, crop, stride)
    seen = torch.zeros(height, width, dtype=torch.long)
    size = min(crop[0], height), min(crop[1], width)
    for top, bottom, left, right in boxes:
        assert 0 <= top and bottom <= height and 0 <= left and right <= width
        assert (bottom - top, right - left) == size
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1 or stride[0] < crop[0]
    assert seen.min() >= 1
    count = math.prod(
        math.ceil(max(side - length, 0) / step) + 1
        for side, length, step in zip(
            (height, width), crop, stride, strict=True))
    assert len(boxes) == len(set(boxes)) == count
    assert boxes == sorted(boxes, key=lambda box: (box[0], box[2]))


# Fusion


def bilinear(maps, height, width):
    """Bilinear up-sampling with half-pixel centres, pixel by pixel."""
    old = maps.shape[-2:]
    result = maps.new_zeros(*maps.shape[:2], height, width)
    for y, x in itertools.product(range(height), range(width)):
        sources = []
        for at, new, side in ((y, height, old[0]), (x, width, old[1])):
            place = min(max((at + .5) * side / new - .5, 0), side - 1)
            low = int(place)
            sources.append((low, min(low + 1, side - 1), place - low))
        (y0, y1, v), (x0, x1, u) = sources
        result[..., y, x] = (
            (1 - v) * (1 - u) * maps[..., y0, x0]
            + (1 - v) * u * maps[..., y0, x1]
            + v * (1 - u) * maps[..., y1, x0] + v * u * maps[..., y1, x1])
    return result


def slow_fusion(context, detail, attention, box):
    samples, classes, height, width = context.shape
    attention = attention.expand_as(context).clone()
    high, wide = (2 * height, 2 * width) if box else detail.shape[-2:]
    canvas = context.new_zeros(samples, classes, high, wide)
    if box is None:
        canvas = detail
    else:
        for y, x in itertools.product(range(height), range(width)):
            if not (box[0] <= 2 * y < box[1] and box[2] <= 2 * x < box[3]):
                attention[..., y, x] = 0
        for y, x in itertools.product(range(high), range(wide)):
            if box[0] <= y < box[1] and box[2] <= x < box[3]:
                canvas[..., y, x] = detail[..., y - box[0], x - box[2]]
    return (bilinear((1 - attention) * context, high, wide)
            + bilinear(attention, high, wide) * canvas)


@pytest.mark.parametrize('samples, channels, box', [
    (1, 3, (2, 8, 0, 4)), (2, 1, (0, 6, 2, 10)), (3, 3, (4, 10, 6, 10)),
    (2, 3, (0, 10, 0, 10)), (2, 3, None)])
def test_fusion_equals_the_loops(samples, channels, box):
    gen = torch.Generator().manual_seed(samples)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    size = (10, 10) if box is None else (box[1] - box[0], box[3] - box[2])
    context, detail = draw(samples, 3, 5, 5), draw(samples, 3, *size)
    attention = draw(samples, channels, 5, 5).sigmoid()
    got = ops.fuse_detail(context, detail, attention, box)
    want = slow_fusion(context, detail, attention, box)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_without_a_box_the_size_of_the_detail_counts():
    context, attention = torch.randn(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    detail = torch.randn(1, 2, 5, 7)  # an odd side, halved upwards
    got = ops.fuse_detail(context, detail, attention)
    want = slow_fusion(context, detail, attention, None)
    torch.testing.assert_close(got, want)


def test_fusion_with_another_factor():
    context, attention = torch.randn(1, 2, 2, 3), torch.ones(1, 2, 2, 3)
    detail = torch.randn(1, 2, 8, 12)
    box = (0, 8, 0, 12)
    got = ops.fuse_detail(context, detail, attention, box, factor=4)
    torch.testing.assert_close(got, detail)


def test_fusion_passes_gradients_to_all_three():
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=gen,
                          dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(
        lambda *parts: ops.fuse_detail(*parts, box=(2, 6, 0, 4)),
        (draw(2, 2, 3, 3), draw(2, 2, 4, 4), draw(2, 1, 3, 3)))


def test_a_detail_that_does_not_fill_its_box_is_a_clear_mistake():
    context = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r'4 x 4 .* box \(0, 4, 0, 6\)'):
        ops.fuse_detail(context, torch.zeros(1, 2, 4, 4), context,
                        (0, 4, 0, 6))
    with pytest.raises(ValueError, match='multiples of 2'):
        ops.fuse_detail(context, torch.zeros(1, 2, 4, 4), context,
                        (1, 5, 0, 4))


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_merged_windows_are_the_mean_of_what_covers_each_pixel(samples):
    gen = torch.Generator().manual_seed(0)
    boxes = ops.slide_boxes(7, 9, (4, 4), (2, 3))
    windows = torch.randn(len(boxes), samples, 2, 4, 4, generator=gen)
    got = ops.merge_windows(windows, boxes, (7, 9))
    for y, x in itertools.product(range(7), range(9)):
        there = [window[..., y - box[0], x - box[2]]
                 for window, box in zip(windows, boxes, strict=True)
                 if box[0] <= y < box[1] and box[2] <= x < box[3]]
        torch.testing.assert_close(
            got[..., y, x], torch.stack(there).mean(0))


# Block mask


@pytest.mark.parametrize('height, width, block', [
    (64, 64, 16), (48, 80, 32), (30, 50, 16), (7, 9, 64)])
@pytest.mark.parametrize('samples', [1, 3])
def test_block_mask_equals_the_loops(samples, height, width, block):
    gen = torch.Generator().manual_seed(0)
    rows, columns = ops.block_grid(height, width, block)
    assert rows == max(round(height / block), 1)
    assert columns == max(round(width / block), 1)
    uniforms = torch.rand(samples, rows, columns, generator=gen)
    got = ops.block_mask(uniforms, height, width, 0.6)
    assert got.shape == (samples, height, width) and got.dtype == torch.bool
    for n, y, x in itertools.product(
            range(samples), range(height), range(width)):
        u = uniforms[n, y * rows // height, x * columns // width]
        assert got[n, y, x] == (u > 0.6)


def test_a_block_at_the_ratio_is_hidden():
    uniforms = torch.tensor([[[0.5, 0.75]]])
    assert ops.block_mask(uniforms, 1, 4, 0.5)[0, 0].tolist() == [
        False, False, True, True]


def test_hidden_blocks_are_zero_in_all_channels():
    images = torch.rand(2, 3, 8, 8) + 1
    uniforms = torch.tensor([[[.9, .1], [.2, .8]], [[.1, .9], [.9, .9]]])
    hidden = ops.hide_blocks(images, uniforms, 0.7)
    assert hidden[0, :, :4, 4:].eq(0).all()
    assert hidden[0, :, 4:, :4].eq(0).all()
    assert hidden[1, :, :4, :4].eq(0).all()
    assert torch.equal(hidden[0, :, 4:, 4:], images[0, :, 4:, 4:])
    assert int((hidden == 0).sum()) == 3 * 3 * 16
    assert ops.hide_blocks(images.bfloat16(), uniforms).dtype == (
        torch.bfloat16)


# Labels at the resolution of features


def slow_downscaling(labels, factor, num_classes, min_ratio):
    samples, height, width = labels.shape
    result = torch.full(
        (samples, height // factor, width // factor), 255)
    for n, y, x in itertools.product(*map(range, result.shape)):
        cell = labels[n, y * factor:(y + 1) * factor,
                      x * factor:(x + 1) * factor].flatten().tolist()
        known = [c if 0 <= c < num_classes else 255 for c in cell]
        best = max(sorted(set(known)), key=known.count)
        if best != 255 and known.count(best) / len(cell) >= min_ratio:
            result[n, y, x] = best
    return result


@pytest.mark.parametrize('samples, factor, min_ratio', [
    (1, 2, .75), (2, 4, .25), (3, 4, 0.), (2, 3, 5 / 9), (2, 1, 1.),
    (1, 10, .3)])
def test_downscaled_labels_equal_the_loops(samples, factor, min_ratio):
    gen = torch.Generator().manual_seed(factor)
    labels = torch.randint(
        0, 5, (samples, 5 * factor, 3 * factor), generator=gen)
    labels[labels == 4] = 255
    labels[:, :factor, :1] = 3
    before = labels.clone()
    got = ops.downscale_labels(labels, factor, 3, min_ratio)
    assert got.dtype == torch.int64
    assert torch.equal(got, slow_downscaling(labels, factor, 3, min_ratio))
    assert torch.equal(labels, before)


def test_a_share_equal_to_the_ratio_is_enough():
    # 0.7 has no exact float.
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0, 7:] = 1
    assert ops.downscale_labels(labels, 10, 2, 0.7).item() == 0
    labels[0, 6, 0] = 1
    assert ops.downscale_labels(labels, 10, 2, 0.7).item() == 255


def test_of_equal_shares_the_lowest_class_wins_and_255_loses():
    labels = torch.tensor([[[1, 1, 2, 255], [0, 0, 255, 2]]])
    assert ops.downscale_labels(labels, 2, 3, 0.5)[0].tolist() == [[0, 2]]


def test_another_ignored_label():
    labels = torch.tensor([[[-1, -1, 1, 1], [-1, 1, 0, 1]]])
    assert ops.downscale_labels(
        labels, 2, 2, ignore_index=-1)[0].tolist() == [[-1, 1]]
    assert ops.downscale_labels(labels, 2, 2, .8)[0].tolist() == [[255, 255]]


def test_labels_of_another_memory_layout():
    labels = torch.randint(0, 3, (2, 6, 4)).transpose(1, 2)
    assert torch.equal(ops.downscale_labels(labels, 2, 3),
                       ops.downscale_labels(labels.contiguous(), 2, 3))


@pytest.mark.parametrize('size', [(30, 32), (32, 30)])
def test_labels_that_do_not_divide_are_a_clear_mistake(size):
    with pytest.raises(ValueError, match='multiples of 4'):
        ops.downscale_labels(torch.zeros(1, *size).long(), 4, 3)


# Feature distance


def draw_features(samples, dtype=torch.float64):
    gen = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 4, 3, 2, generator=gen, dtype=dtype)
    reference = torch.randn(samples, 4, 3, 2, generator=gen, dtype=dtype)
    mask = torch.rand(samples, 3, 2, generator=gen) < .5
    return features, reference, mask


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_feature_distance_equals_the_loops(samples):
    features, reference, mask = draw_features(samples)
    each = [(features[n, :, y, x] - reference[n, :, y, x]).norm()
            for n, y, x in mask.nonzero().tolist()]
    got = ops.masked_feature_distance(features, reference, mask)
    torch.testing.assert_close(got, torch.stack(each).mean())
    assert got.dtype == torch.float64


def test_gradient_of_the_feature_distance():
    features, reference, mask = draw_features(2)
    assert torch.autograd.gradcheck(
        lambda f, r: ops.masked_feature_distance(f, r, mask),
        (features.requires_grad_(), reference.requires_grad_()))


def test_feature_distance_of_half_precision_is_computed_in_full():
    # A square above 65504 is infinite in float16.
    features = torch.full((1, 2, 1, 1), 300.).half()
    distance = ops.masked_feature_distance(
        features, -features, torch.ones(1, 1, 1).bool())
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(600 * math.sqrt(2))
    features, reference, mask = draw_features(2, torch.float32)
    full = ops.masked_feature_distance(features, reference, mask)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = ops.masked_feature_distance(features, reference, mask)
    assert torch.equal(full, mixed)


def test_positions_outside_of_the_mask_have_no_influence():
    features, reference, mask = draw_features(3)
    features.requires_grad_()
    distance = ops.masked_feature_distance(features, reference, mask)
    grad, = torch.autograd.grad(distance, features)
    assert grad.permute(0, 2, 3, 1)[~mask].eq(0).all()
    assert grad.permute(0, 2, 3, 1)[mask].abs().sum(1).gt(0).all()
    changed = torch.where(mask.unsqueeze(1), reference, 1e6)
    assert ops.masked_feature_distance(features, changed, mask) == distance


# The device


def test_nothing_asks_for_a_value():
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    def draw(*shape):
        return torch.rand(shape, device='meta')

    labels = torch.zeros(2, 32, 32, dtype=torch.long, device='meta')
    context, detail = draw(2, 3, 8, 8).requires_grad_(), draw(2, 3, 8, 8)
    small = ops.downscale_labels(labels, 4, 3)
    distance = ops.masked_feature_distance(context, detail, small == 1)
    fused = ops.fuse_detail(context, detail, context.sigmoid(),
                            (0, 8, 4, 12))
    (distance + fused.sum()).backward()
    ops.hide_blocks(draw(2, 3, 32, 32), draw(2, 4, 4))
    ops.merge_windows(draw(9, 2, 3, 8, 8), ops.slide_boxes(
        16, 16, (8, 8), (4, 4)), (16, 16))
    assert context.grad.shape == context.shape
