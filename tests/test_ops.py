"""The pure functions, against closed forms and loops.

Those with published numbers are in test_reference_rows.py too.
"""

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_contrast import ops

# EMA


def test_first_ema_update_copies_even_over_nan():
    teacher, student = [torch.full((2, ), math.nan)], [torch.ones(2)]
    ops.ema_update(teacher, student, ops.annealed_alpha(0, 0.99))
    assert torch.equal(teacher[0], student[0])


# ClassMix


def test_ignored_pixels_are_a_class_unless_told_otherwise():
    labels = torch.tensor([[[0, 2, 255]], [[0, 0, 0]]])
    with_ignore = ops.present_classes(labels, 3, scope='sample')
    without = ops.present_classes(
        labels, 3, scope='sample', mix_ignore=False)
    assert with_ignore.int().tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]
    assert without.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_half_of_the_present_classes_is_chosen(num_classes, seed):
    gen = torch.Generator().manual_seed(seed)
    present = torch.rand(3, num_classes + 1, generator=gen) < 0.5
    chosen = ops.choose_classes(
        present, torch.rand(3, num_classes + 1, generator=gen))
    assert not (chosen & ~present).any()
    for row, picked in zip(present, chosen, strict=True):
        n = int(row.sum())
        assert int(picked.sum()) == (n + n % 2) // 2


def test_every_subset_is_equally_likely():
    present = torch.tensor([[True, True, False, True, True]])
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(6000, 5, generator=gen)
    chosen = ops.choose_classes(present.expand(6000, -1), scores)
    codes = (chosen.long() * torch.tensor([1, 2, 4, 8, 16])).sum(1)
    counts = torch.bincount(codes, minlength=32)
    counts = counts[counts > 0]
    assert len(counts) == 6  # 4 choose 2
    assert (counts - 1000).abs().max() < 130


def test_an_image_without_labels_survives():
    labels = torch.full((1, 4, 4), 255)
    for mix_ignore, count in ((True, 16), (False, 0)):
        present = ops.present_classes(labels, 3, 'sample', mix_ignore)
        chosen = ops.choose_classes(present, torch.rand(1, 4))
        assert int(ops.class_mask(labels, chosen).sum()) == count


# Pseudo-labels


def test_a_pixel_at_the_threshold_is_confident():
    confidence = torch.tensor([[[0.5, 0.25]]])
    assert ops.confident_fraction(confidence, 0.5).item() == 0.5


def test_absent_classes_are_softmaxed_away():
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(
        1))
    absent = torch.tensor([False, True, False, False, True])
    got = ops.without_classes(logits.softmax(1), absent)
    want = logits.masked_fill(absent.view(1, -1, 1, 1), -math.inf).softmax(1)
    torch.testing.assert_close(got, want)


# Colour and blur


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3),
       st.floats(0, 2), st.floats(-1, 1))
def test_saturation_and_hue_are_those_of_hsv(rgb, factor, turn):
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    image = torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)
    neutral = torch.tensor([[1., 1., 1., 0.]], dtype=torch.float64)
    order = torch.arange(4).unsqueeze(0)
    for changed, place, number in (
            ((hue, min(saturation * factor, 1), value), 2, factor),
            (((hue + turn) % 1, saturation, value), 3, turn)):
        factors = neutral.clone()
        factors[0, place] = number
        want = torch.tensor(colorsys.hsv_to_rgb(*changed)).view_as(image)
        # The published eps of 1e-6 in the saturation, once or twice.
        torch.testing.assert_close(
            ops.color_jitter(image, factors, order), want.to(image),
            rtol=0, atol=1e-5)


def test_each_sample_has_its_own_order_and_factors():
    gen = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 4, 5, generator=gen, dtype=torch.float64)
    images[:2] = (3 * images[:2]).round() / 3  # greys, and equal channels
    factors = torch.rand(6, 4, generator=gen, dtype=torch.float64) + .5
    factors[:, 3] -= 1
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1],
                          [2, 3, 0, 1], [1, 0, 2, 3], [3, 2, 0, 1]])

    def pixel(rgb, operation, factor):
        if operation == 0:
            return [min(max(one + factor - 1, 0), 1) for one in rgb]
        if operation == 1:
            return [min(one * factor, 1) for one in rgb]
        hue, _, value = colorsys.rgb_to_hsv(*rgb)
        saturation = (max(rgb) - min(rgb)) / (value + 1e-6)
        if operation == 2:
            saturation = min(saturation * factor, 1)
        else:
            hue = (hue + factor) % 1
        return list(colorsys.hsv_to_rgb(hue, saturation, value))

    got = ops.color_jitter(images, factors, order)
    for i in range(6):
        for y in range(4):
            for x in range(5):
                want = images[i, :, y, x].tolist()
                for operation in order[i].tolist():
                    want = pixel(want, operation, factors[i, operation].item())
                assert got[i, :, y, x].tolist() == pytest.approx(
                    want, abs=1e-12)


# Randomness


def test_draws_are_a_function_of_position():
    def draw(*keys):
        return torch.rand(4, generator=ops.generator_at(*keys)).tolist()

    assert draw(0, 0, 5, 'mixed') == draw(0, 0, 5, 'mixed')
    others = [draw(1, 0, 5, 'mixed'), draw(0, 1, 5, 'mixed'),
              draw(0, 0, 6, 'mixed'), draw(0, 0, 5, 'masked'),
              draw(0, 0, '5', 'mixed')]
    assert len({tuple(d) for d in [*others, draw(0, 0, 5, 'mixed')]}) == 6
    assert ops.position_seed(0, 'source') == 3219115974970673462


def test_forked_rng_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with ops.forked_rng(torch.device('cpu'), 1, 'a'):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with ops.forked_rng(torch.device('cpu'), 1, 'a'):
        assert torch.equal(torch.rand(3), first)


def test_what_is_large_is_pinned_before_it_is_sent(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.Tensor, 'is_pinned', lambda self: False)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: steps.append(
        'pinned') or self)
    monkeypatch.setattr(
        torch.Tensor, 'to', lambda self, device, non_blocking: steps.append(
            (device.type, non_blocking)) or self)
    large, small = torch.zeros(2**14 + 1), torch.zeros(2**14)
    for values, device in ((large, 'cuda'), (small, 'cuda'), (large, 'cpu')):
        assert ops.send(values, device) is values
    assert steps == ['pinned', ('cuda', True), ('cuda', True), ('cpu', True)]


def test_seeds_look_independent():
    seeds = [ops.position_seed(0, 0, i, 'x') for i in range(2000)]
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds])
    assert np.abs(bits.mean(0) - .5).max() < .06
