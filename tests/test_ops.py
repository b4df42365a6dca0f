"""The pure functions, against pinned numbers, closed forms and loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_contrast import ops

A = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 3, 255, 255, 2]] * 2
B = [[5] * 6, [5, 5, 5, 6, 6, 6], [0, 0, 0, 6, 6, 6], [0] * 6]
LABELS = torch.tensor([A, B])


def _chosen(*classes, num_classes=7):
    chosen = torch.zeros(1, num_classes + 1, dtype=torch.bool)
    for c in classes:
        chosen[0, num_classes if c == 255 else c] = True
    return chosen


# EMA


def test_annealed_ema_has_the_published_values():
    teacher, student = [torch.ones(3)], [torch.ones(3)]
    seen = []
    for step in range(1, 6):
        student[0].fill_(step + 1)
        ops.ema_update(teacher, student, ops.annealed_alpha(step, 0.999))
        seen.append(teacher[0][0].item())
    assert seen == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5], abs=1e-6)
    assert ops.annealed_alpha(0, 0.999) == 0
    assert ops.annealed_alpha(998, 0.999) == pytest.approx(0.998998998999)
    assert ops.annealed_alpha(999, 0.999) == 0.999


def test_ema_by_foreach_equals_the_loop_bit_for_bit():
    gen = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7, ), (2, 3, 3, 3), ()]
    teacher = [torch.randn(s, generator=gen) for s in shapes]
    student = [torch.randn(s, generator=gen) for s in shapes]
    expected = [t * 0.99 + s * (1 - 0.99)
                for t, s in zip(teacher, student, strict=True)]
    ops.ema_update(teacher, student, 0.99)
    for got, want in zip(teacher, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    looped = [t.clone() for t in teacher]
    for one, new in zip(looped, student, strict=True):
        one.mul_(0.9).add_(new, alpha=1 - 0.9)
    ops.ema_update(teacher, student, 0.9)
    assert all(torch.equal(t, one)
               for t, one in zip(teacher, looped, strict=True))


def test_first_ema_update_copies_even_over_nan():
    teacher, student = [torch.full((2, ), math.nan)], [torch.ones(2)]
    ops.ema_update(teacher, student, ops.annealed_alpha(0, 0.99))
    assert torch.equal(teacher[0], student[0])


# ClassMix


def test_present_classes_of_batch_and_sample():
    batch = ops.present_classes(LABELS, 7)
    assert batch[0].tolist() == batch[1].tolist() == [
        True, True, True, True, False, True, True, True]
    sample = ops.present_classes(LABELS, 7, scope='sample')
    assert sample[0].tolist() == [
        True, True, True, True, False, False, False, True]
    assert sample[1].tolist() == [
        True, False, False, False, False, True, True, False]
    without = ops.present_classes(LABELS, 7, mix_ignore=False)
    assert not without[:, 7].any()
    assert torch.equal(without[:, :7], batch[:, :7])


def test_class_masks_have_the_published_values():
    first = ops.class_mask(LABELS[:1], _chosen(255, 2, 1, 3))
    assert first[0].int().tolist() == [[0, 0, 1, 1, 1, 1]] * 2 + [
        [1] * 6] * 2
    second = ops.class_mask(LABELS[1:], _chosen(1, 0, 255, 3))
    assert second[0].int().tolist() == [
        [0] * 6, [0] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]


def test_mix_has_the_published_values():
    mask = ops.class_mask(LABELS[:1], _chosen(255, 2, 1, 3))
    image = torch.arange(72.).view(1, 3, 4, 6)
    assert ops.mix(mask, image, -image).sum().item() == 1896.
    labels = ops.mix(mask, LABELS[:1], torch.full_like(LABELS[:1], 9))
    assert labels[0].tolist() == [[9, 9, 1, 1, 2, 2]] * 2 + [
        [3, 3, 3, 255, 255, 2]] * 2


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


def _pinned_logits():
    logits = torch.zeros(2, 3, 4, 6)
    logits[:, 0] = torch.linspace(0, 6, 24).view(4, 6)
    logits[1, 1] = 2
    return logits


def test_confident_fraction_has_the_published_values():
    confidence, labels = ops.hard_labels(_pinned_logits().softmax(1))
    q = ops.confident_fraction(confidence, 0.968)
    assert q.item() == pytest.approx(10 / 48)
    each = ops.confident_fraction(confidence, 0.968, 'sample')
    assert each.tolist() == pytest.approx([8 / 24, 2 / 24])
    assert ops.confident_fraction(confidence, 0.968, 'local') == q
    assert labels[1, 0].tolist() == [1] * 6


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


def test_jitter_operations_have_the_published_values():
    pixel = torch.tensor([.1, .5, .9]).view(1, 3, 1, 1)

    def run(op, amount):
        factors = torch.tensor([[1., 1., 1., 0.]])
        factors[0, op] = amount
        # The operation of interest comes first; the others are neutral.
        order = torch.tensor([[op] + [o for o in range(4) if o != op]])
        return ops.color_jitter(pixel, factors, order).flatten().tolist()

    assert run(0, 1.2) == pytest.approx([.3, .7, 1.], abs=1e-6)
    assert run(1, 1.2) == pytest.approx([.12, .6, 1.], abs=1e-6)
    assert run(2, 1.2) == pytest.approx([0., .45, .9], abs=1e-6)
    turns = .5 / (2 * math.pi)
    assert run(3, turns) == pytest.approx([.1, .11803, .9], abs=1e-5)


def test_jitter_of_two_samples_has_the_published_values():
    images = torch.tensor([[.1, .5, .9], [.8, .3, .2]]).view(2, 3, 1, 1)
    factors = torch.tensor([
        [.9985027, .8353910, .9960374, -.0770309],
        [1.1072887, .8528122, 1.1585779, .0536315]])
    order = torch.tensor([[1, 0, 3, 2]] * 2)
    got = ops.color_jitter(images, factors, order).flatten(1)
    assert got[0].tolist() == pytest.approx(
        [.084692, .725183, .750355], abs=3e-6)
    assert got[1].tolist() == pytest.approx(
        [.789539, .486281, .196710], abs=3e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_hsv_and_back(rgb):
    from mmseg_contrast.ops.color import hsv_to_rgb, rgb_to_hsv
    image = torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)
    hue, saturation, value = rgb_to_hsv(image)
    assert 0 <= hue.item() <= 1 and 0 <= saturation.item() <= 1
    torch.testing.assert_close(
        hsv_to_rgb(hue, saturation, value), image, rtol=0, atol=1e-7)


def test_blur_is_within_a_millionth_of_the_published_kernel():
    gen = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 64, 64, generator=gen, dtype=torch.float64)
    sigma = torch.tensor([1.15, 0.4], dtype=torch.float64)
    got = ops.gaussian_blur(image, sigma)
    for i in range(2):
        taps = torch.arange(-25, 26, dtype=torch.float64)
        line = torch.exp(-taps**2 / (2 * sigma[i]**2))
        kernel = torch.outer(line, line)
        kernel = (kernel / kernel.sum()).expand(3, 1, 51, 51)
        padded = F.pad(image[i:i + 1], (25, ) * 4, mode='reflect')
        want = F.conv2d(padded, kernel, groups=3)
        assert (got[i:i + 1] - want).abs().max() < 2e-6


def test_blur_radius_follows_the_published_kernel_sizes():
    sizes = [2 * ops.reference_blur_radius(side) + 1
             for side in (64, 512, 640, 768, 1024)]
    assert sizes == [7, 51, 63, 77, 103]


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


def test_seeds_look_independent():
    seeds = [ops.position_seed(0, 0, i, 'x') for i in range(2000)]
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds])
    assert np.abs(bits.mean(0) - .5).max() < .06
