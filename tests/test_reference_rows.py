"""Numbers that the published code gives, measured there, row by row.

DACS, DAFormer, HRDA, MIC and SePiCo. Where the published code draws random
numbers, its draws are made here and handed to our functions.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from mmseg.models.losses import CrossEntropyLoss
from torch import nn

from mmseg_contrast import ops
from mmseg_contrast.adaptation.losses import weighted_loss
from mmseg_contrast.adaptation.pseudo_labels import ConfidentFraction
from mmseg_contrast.adaptation.teachers import EMATeacher
from mmseg_contrast.datasets.rare_class import rare_class_probabilities
from mmseg_contrast.models import DAFormerHead

SCHEDULE = Path(__file__).resolve().parent.parent / (
    'configs/_base_/schedules/adamw_40k_warmup.py')
SEVEN = dict(rel=0, abs=5e-7)  # numbers given to six digits behind the point

# 1: moving average


def test_reference_row_01_moving_average():
    teacher, student = [torch.ones(3)], [torch.ones(3)]
    seen = []
    for step in range(1, 6):
        student[0].fill_(step + 1)
        ops.ema_update(teacher, student, ops.annealed_alpha(step, 0.999))
        seen.append(teacher[0][0].item())
    assert seen == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5], abs=1e-6)
    assert ops.annealed_alpha(0, 0.999) == 0
    assert ops.annealed_alpha(998, 0.999) == pytest.approx(
        0.998998998999, abs=5e-13)
    assert ops.annealed_alpha(999, 0.999) == 0.999


def test_reference_row_01_foreach_equals_the_loop_bit_for_bit():
    gen = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7, ), (2, 3, 3, 3), ()]
    teacher = [torch.randn(s, generator=gen) for s in shapes]
    student = [torch.randn(s, generator=gen) for s in shapes]
    looped = [t.clone() for t in teacher]
    for one, new in zip(looped, student, strict=True):
        one.mul_(0.999).add_(new, alpha=1 - 0.999)
    ops.ema_update(teacher, student, 0.999)
    assert all(torch.equal(t, one)
               for t, one in zip(teacher, looped, strict=True))


def test_reference_row_01_the_teacher_has_no_gradients():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


# 2 and 3: ClassMix

A = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 3, 255, 255, 2]] * 2
B = [[5] * 6, [5, 5, 5, 6, 6, 6], [0, 0, 0, 6, 6, 6], [0] * 6]
LABELS = torch.tensor([A, B])
CLASSES = 7


def chosen_of(*rows):
    """The classes picked for each sample as a mask; 255 is the last."""
    chosen = torch.zeros(len(rows), CLASSES + 1, dtype=torch.bool)
    for mask, ids in zip(chosen, rows, strict=True):
        mask[[CLASSES if c == 255 else c for c in ids]] = True
    return chosen


def ids_of(mask):
    return [255 if c == CLASSES else c
            for c in mask.nonzero().flatten().tolist()]


@pytest.mark.parametrize('scope, picks', [
    ('batch', [[255, 2, 1, 3], [1, 0, 255, 3]]),
    ('sample', [[2, 0, 1], [0, 6]])])
def test_reference_row_02_chosen_classes(scope, picks):
    rng = np.random.RandomState(0)
    present = ops.present_classes(LABELS, CLASSES, scope)
    scores = torch.full((2, CLASSES + 1), 0.9)
    for i in range(2):
        there = ids_of(present[i])
        drawn = rng.choice(
            there, (len(there) + len(there) % 2) // 2, replace=False)
        assert drawn.tolist() == picks[i]
        scores[i, [CLASSES if c == 255 else c for c in drawn]] = 0.1
    # As many as the published code draws win, and no other class.
    assert torch.equal(
        ops.choose_classes(present, scores), chosen_of(*picks))


def test_reference_row_02_present_classes():
    batch = ops.present_classes(LABELS, CLASSES)
    assert ids_of(batch[0]) == ids_of(batch[1]) == [0, 1, 2, 3, 5, 6, 255]
    sample = ops.present_classes(LABELS, CLASSES, scope='sample')
    assert ids_of(sample[0]) == [0, 1, 2, 3, 255]
    assert ids_of(sample[1]) == [0, 5, 6]


def test_reference_row_02_class_masks():
    masks = ops.class_mask(LABELS, chosen_of([255, 2, 1, 3], [1, 0, 255, 3]))
    assert masks[0].int().tolist() == [[0, 0, 1, 1, 1, 1]] * 2 + [[1] * 6] * 2
    # Class 6 covers the right half of row 2; only class 0 was picked there.
    assert masks[1].int().tolist() == [
        [0] * 6, [0] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]


def test_reference_row_03_mix():
    mask = ops.class_mask(LABELS[:1], chosen_of([255, 2, 1, 3]))
    image = torch.arange(144.).view(2, 3, 4, 6)[:1]
    mixed = ops.mix(mask, image, -image)
    assert mixed.shape == (1, 3, 4, 6) and mixed.sum().item() == 1896.
    labels = ops.mix(mask, LABELS[:1], torch.full_like(LABELS[:1], 9))
    assert labels.dtype == torch.int64
    assert labels[0].tolist() == [[9, 9, 1, 1, 2, 2]] * 2 + [
        [3, 3, 3, 255, 255, 2]] * 2


# 4: pseudo-labels


def pseudo_label_probabilities():
    logits = torch.zeros(2, 3, 4, 6)
    logits[:, 0] = torch.linspace(0, 6, 24).view(4, 6)
    logits[1, 1] = 2
    return logits.softmax(1)


def test_reference_row_04_confident_fraction():
    confidence, labels = ops.hard_labels(pseudo_label_probabilities())
    q = ops.confident_fraction(confidence, 0.968)
    assert q.item() == pytest.approx(10 / 48, abs=1e-7)
    each = ops.confident_fraction(confidence, 0.968, 'sample')
    assert each.tolist() == pytest.approx([.3333333, .0833333], abs=1e-7)
    assert ops.confident_fraction(confidence, 0.968, 'local') == q
    assert labels[1, 0].tolist() == [1] * 6


def test_reference_row_04_ignored_rows_weigh_nothing():
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[:, [0, 3]] = False
    step = SimpleNamespace(
        view=lambda name: SimpleNamespace(valid=valid),
        teacher=lambda name, view: pseudo_label_probabilities(),
        log=lambda name, value: None)
    policy = ConfidentFraction(num_classes=3, threshold=0.968)
    weights = policy(step, 'target').weights
    assert weights[:, [0, 3]].eq(0).all()
    # The share counts the ignored rows, too.
    torch.testing.assert_close(
        weights[:, 1:3], torch.full((2, 2, 6), 10 / 48))


# 5 and 6: feature distance


def test_reference_row_05_downscaled_labels():
    labels = torch.empty(1, 8, 8, dtype=torch.long)
    labels[:, :4, :4] = 11
    labels[:, :4, 4:] = 13
    labels[:, 0, 4:] = 0  # leaves 0.75 of the cell to class 13
    labels[:, 4:, :4] = 255
    labels[:, 4:6, 4:] = 17  # 0.5 each
    labels[:, 6:, 4:] = 18
    assert ops.downscale_labels(labels, 4, 19, 0.75)[0].tolist() == [
        [11, 13], [255, 255]]


def test_reference_row_06_masked_feature_distance():
    features = (torch.arange(16.).view(1, 4, 2, 2) / 10).requires_grad_()
    other = torch.full_like(features, 0.5)
    mask = torch.tensor([[[True, True], [False, False]]])
    distance = ops.masked_feature_distance(features, other, mask)
    assert distance.item() == pytest.approx(0.9481555, abs=1e-7)
    assert 0.005 * distance.item() == pytest.approx(0.00474078, abs=5e-9)
    everywhere = ops.masked_feature_distance(
        features, other, torch.ones_like(mask))
    assert everywhere.item() == pytest.approx(1.0433359, abs=1e-7)
    grad, = torch.autograd.grad(distance, features)
    assert grad.abs().sum().item() == pytest.approx(1.6893681, abs=3e-7)


def test_reference_row_06_zeros_where_the_published_loss_is_nan():
    features = torch.rand(1, 4, 2, 2).requires_grad_()
    other, nothing = torch.rand(1, 4, 2, 2), torch.zeros(1, 2, 2).bool()
    empty = ops.masked_feature_distance(features, other, nothing)
    equal = ops.masked_feature_distance(
        features, features.detach(), ~nothing)
    for distance in (empty, equal):
        grad, = torch.autograd.grad(distance, features)
        assert distance.item() == 0 and grad.eq(0).all()


# 7: rare classes


@pytest.mark.parametrize('temperature, expected', [
    (.01, [.403766, .388304, .207895, 3.5741e-5, 1.39344e-9, 1.2551e-31]),
    (.1, [.288305, .287182, .269789, .113385, .0410817, 2.56512e-4]),
    (math.inf, [1 / 6] * 6)])
def test_reference_row_07_rare_class_probabilities(temperature, expected):
    pixels = np.zeros(19)
    pixels[[0, 2, 10, 11, 16, 18]] = [
        900000, 250000, 120000, 9000, 1000, 500]
    got = rare_class_probabilities(pixels, temperature)
    assert got[[18, 16, 11, 10, 2, 0]] == pytest.approx(expected, rel=3e-5)
    assert np.count_nonzero(got) == 6 and got.sum() == pytest.approx(1)


# 8 to 10: detail crops and their fusion

BOX = (352, 864, 376, 888)


def test_reference_row_08_crop_boxes():
    rng = np.random.RandomState(0)
    places = (512 + 1) // 8  # the published range, without the last offset
    boxes = []
    for _ in range(4):
        uniforms = [(rng.randint(0, places) + .5) / places for _ in 'yx']
        boxes.append(ops.draw_crop_box(
            1024, 1024, (512, 512), tuple(uniforms), divisor=8,
            include_last=False))
    assert boxes == [BOX, (424, 936, 0, 512), (24, 536, 472, 984),
                     (24, 536, 312, 824)]


def test_reference_row_08_only_the_published_range_lacks_the_border():
    ends = (1 - 1e-9, 1 - 1e-9)
    published = ops.draw_crop_box(
        1024, 1024, (512, 512), ends, include_last=False)
    assert published == (504, 1016, 504, 1016)
    assert ops.draw_crop_box(1024, 1024, (512, 512), ends) == (
        512, 1024, 512, 1024)


def test_reference_row_09_scaled_boxes():
    assert ops.scale_box(BOX, 8) == (44, 108, 47, 111)
    assert ops.scale_box(BOX, 4) == (88, 216, 94, 222)


def test_reference_row_10_fusion():
    context = torch.linspace(-1, 1, 128).view(1, 2, 8, 8)
    detail = torch.linspace(2, -2, 128).view(1, 2, 8, 8)
    box = ops.scale_box((16, 48, 8, 40), 4)
    fused = ops.fuse_detail(
        context, detail, torch.sigmoid(3 * context), box)
    assert fused.shape == (1, 2, 16, 16)
    assert fused.sum().item() == pytest.approx(-59.089325, abs=2e-5)
    assert fused[0, 0, 4, 2:6].tolist() == pytest.approx(
        [-.613974, -.555328, -.546121, -.536960], **SEVEN)
    # One cell outside of the box and further, the context alone counts.
    plain = F.interpolate(context, scale_factor=2, mode='bilinear')
    assert torch.equal(fused[..., 13:, :], plain[..., 13:, :])
    assert torch.equal(fused[..., 11:], plain[..., 11:])
    assert plain[0, 1, 0, 0].item() == pytest.approx(0.007874, **SEVEN)


def test_reference_row_10_the_teacher_has_nine_windows():
    boxes = ops.slide_boxes(1024, 1024, (512, 512), (256, 256))
    assert len(boxes) == 9
    assert boxes[:4] == [(0, 512, 0, 512), (0, 512, 256, 768),
                         (0, 512, 512, 1024), (256, 768, 0, 512)]


# 11: block mask


def test_reference_row_11_block_mask():
    torch.manual_seed(0)
    assert ops.block_grid(256, 512, 64) == (4, 8)
    mask = ops.block_mask(torch.rand(2, 1, 4, 8)[:, 0], 256, 512, 0.7)
    assert mask.float().mean((1, 2)).tolist() == [.21875, .3125]
    assert mask[0, ::64, ::64].int().tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 1], [0] * 8, [0, 1, 0, 0, 0, 1, 0, 1],
        [0, 0, 1, 0, 0, 0, 0, 1]]


def test_reference_row_11_blocks_that_do_not_divide_the_image():
    torch.manual_seed(0)
    assert ops.block_grid(540, 960, 64) == (8, 15)
    mask = ops.block_mask(torch.rand(1, 1, 8, 15)[:, 0], 540, 960, 0.7)
    assert mask.float().mean().item() == pytest.approx(.275185, **SEVEN)


# 12: learning rate


def test_reference_row_12_learning_rate():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([
        dict(params=[weights[0]], lr=6e-5), dict(params=[weights[1]],
                                                 lr=6e-4)])
    config = Config.fromfile(str(SCHEDULE))
    schedulers = [PARAM_SCHEDULERS.build(
        one, default_args=dict(optimizer=optimizer))
        for one in config.param_scheduler]
    assert not any(scheduler.by_epoch for scheduler in schedulers)
    expected = {
        0: 6.0e-11, 1: 4.005896e-8, 49: 1.957657e-6, 750: 2.943753e-5,
        1499: 5.771300e-5, 1500: 5.775000e-5, 20000: 3.0e-5, 39999: 1.5e-9}
    for iteration in range(config.train_cfg.max_iters):
        if iteration in expected:
            rates = [group['lr'] for group in optimizer.param_groups]
            assert rates[0] == pytest.approx(expected[iteration], rel=2e-7)
            assert rates[1] == pytest.approx(10 * rates[0], rel=1e-9)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-13)


# 13 to 15: colour and blur


@pytest.mark.parametrize('operation, factor, expected', [
    (0, 1.2, [.3, .7, 1.]), (1, 1.2, [.12, .6, 1.]), (2, 1.2, [0., .45, .9]),
    (3, .5 / (2 * math.pi), [.1, .11803, .9])])
def test_reference_row_13_jitter_operations(operation, factor, expected):
    pixel = torch.tensor([.1, .5, .9]).view(1, 3, 1, 1)
    factors = torch.tensor([[1., 1., 1., 0.]])
    factors[0, operation] = factor
    # The operation of interest comes first; the others are neutral.
    order = torch.tensor([[operation] + [
        other for other in range(4) if other != operation]])
    got = ops.color_jitter(pixel, factors, order).flatten()
    assert got.tolist() == pytest.approx(expected, abs=5e-6)


def test_reference_row_14_jitter_of_two_samples():
    images = torch.tensor([[.1, .5, .9], [.8, .3, .2]]).view(2, 3, 1, 1)
    factors = torch.tensor([
        [.9985027, .8353910, .9960374, -.0770309],
        [1.1072887, .8528122, 1.1585779, .0536315]])
    order = torch.tensor([[1, 0, 3, 2]] * 2)
    got = ops.color_jitter(images, factors, order).flatten(1)
    assert got[0].tolist() == pytest.approx(
        [.084692, .725183, .750355], abs=1e-6)
    assert got[1].tolist() == pytest.approx(
        [.789539, .486281, .196710], abs=1e-6)


def test_reference_row_15_blur_kernel_sizes():
    sizes = [2 * ops.reference_blur_radius(side) + 1
             for side in (64, 512, 640, 768, 1024)]
    assert sizes == [7, 51, 63, 77, 103]


def test_reference_row_15_eleven_taps_are_enough():
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
        assert (got[i:i + 1] - want).abs().max() < 1.5e-6


# 16: weighted cross entropy


@pytest.mark.parametrize('over_valid, second, expected', [
    (False, 1., 0.870605), (True, 1., 1.392969), (False, .25, 0.570293)])
def test_reference_row_16_weighted_cross_entropy(
        over_valid, second, expected):
    logits = torch.linspace(-2, 2, 24).view(2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, 255]], [[255, 255], [1, 0]]])
    weights = torch.ones(2, 2, 2)
    weights[1] = second
    loss = CrossEntropyLoss(avg_non_ignore=over_valid)
    got = weighted_loss(loss, logits, labels, weights)
    assert got.item() == pytest.approx(expected, **SEVEN)


# 17: DAFormer's decoder


@pytest.fixture(scope='module')
def daformer_head():
    head = DAFormerHead(in_channels=[64, 128, 320, 512], num_classes=19)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.linspace(
                -.02, .02, weight.numel()).view_as(weight))
        for part in head.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.fill_(1)
                part.bias.zero_()
    stages = [torch.linspace(-1, 1, wide * side**2).view(1, wide, side, side)
              for wide, side in zip(head.in_channels, (16, 8, 4, 2),
                                    strict=True)]
    return head, stages


def test_reference_row_17_decoder_in_evaluation(daformer_head):
    head, stages = daformer_head
    with torch.no_grad():
        logits = head.eval()(stages)
    assert logits.shape == (1, 19, 16, 16)
    assert logits.sum().item() == pytest.approx(358.202606, abs=1e-3)
    assert logits[0, :3, 0, 0].tolist() == pytest.approx(
        [-.931735, -.824309, -.716882], abs=2e-6)


def test_reference_row_17_decoder_with_batch_statistics(daformer_head):
    head, stages = daformer_head
    head.train().dropout.eval()
    with torch.no_grad():
        logits = head(stages)
    assert logits[0, :3, 0, 0].tolist() == pytest.approx(
        [-3.772559, -3.364622, -2.956684], abs=1e-5)


# 18 and 19: class moments and contrast


def seen_by_the_prototypes():
    for k, last in enumerate((2, 0, 2)):
        vectors = torch.sin(.7 * torch.arange(24) + .5 * k).view(6, 4)
        yield F.normalize(vectors, dim=1), torch.tensor([0, 0, 1, 1, 1, last])


def streamed_moments():
    moments = (torch.zeros(3, dtype=torch.long), torch.zeros(3, 4),
               torch.zeros(3, 4))
    for vectors, labels in seen_by_the_prototypes():
        moments = ops.merge_moments(
            moments, ops.class_moments(vectors, labels, 3))
    return moments


def test_reference_row_18_streaming_moments():
    moments = streamed_moments()
    variance = ops.class_variance(moments)
    assert moments[0].tolist() == [7, 9, 2]
    assert moments[1][0].tolist() == pytest.approx(
        [.189131, .098858, -.037909, -.156847], **SEVEN)
    assert variance[0].tolist() == pytest.approx(
        [.130618, .264518, .323557, .209726], **SEVEN)
    vectors, labels = (
        torch.cat(parts)
        for parts in zip(*seen_by_the_prototypes(), strict=True))
    for c in range(3):
        mine = vectors[labels == c]
        torch.testing.assert_close(moments[1][c], mine.mean(0))
        torch.testing.assert_close(variance[c], mine.var(0, correction=0))


def contrast_losses(tau):
    """Prototype, distribution and bank loss, and the regulariser."""
    anchors = F.normalize(
        torch.sin(.7 * torch.arange(16) + 9).view(4, 4), dim=1)
    labels = torch.tensor([0, 1, 2, 255])
    moments = streamed_moments()
    mean, variance = moments[1], ops.class_variance(moments)
    prototype = ops.prototype_energies(anchors, mean, tau)
    positives = ops.own_class(prototype, labels)
    gaussian = ops.gaussian_energies(anchors, mean, variance, tau)
    # The bank holds the two latest batch means of each class.
    queues = [[], [], []]
    for vectors, ids in seen_by_the_prototypes():
        for c in ids.unique().tolist():
            queues[c].append(vectors[ids == c].mean(0))
    keys = torch.stack([torch.stack(queue[-2:]) for queue in queues])
    filled = torch.ones(3, 2, dtype=torch.bool)
    losses = (
        ops.contrast_loss(prototype, positives, labels),
        ops.contrast_loss(gaussian, positives, labels),
        ops.contrast_loss(
            ops.bank_energies(anchors, keys, filled, tau),
            ops.bank_positives(anchors, labels, keys, filled, tau),
            labels, own='positive'))
    extra = ops.contrast_regularizer(anchors, labels, mean, tau)
    return [loss.item() for loss in losses], extra.item()


def test_reference_row_19_contrast_losses():
    losses, extra = contrast_losses(100)
    assert losses == pytest.approx(
        [1.0950680, 1.0950773, 1.0950009], rel=0, abs=5e-7)
    assert [loss + extra for loss in losses] == pytest.approx(
        [.0950674, .0950767, .0950003], rel=0, abs=5e-7)
    sharp, _ = contrast_losses(0.1)
    assert sharp[0] == pytest.approx(1.2934355, rel=1e-6)
    assert sharp[1] == pytest.approx(10.5095596, rel=1e-6)


# 20: one backward for two losses


def test_reference_row_20_merged_and_double_backward_agree():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 4, padding=1)).double()
    classifier = nn.Conv2d(8, 4, 1).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    reference = torch.rand(2, 8, 4, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 4, 4))
    weights = [*net.parameters(), *classifier.parameters()]

    def losses():
        features = net(images)
        return (F.cross_entropy(classifier(features), labels),
                0.005 * ops.masked_feature_distance(
                    features, reference, labels < 2))

    segmentation, distance = losses()
    segmentation.backward(retain_graph=True)
    distance.backward()
    twice = [weight.grad.clone() for weight in weights]
    for weight in weights:
        weight.grad = None
    sum(losses()).backward()
    assert all(weight.grad.abs().max() > 0 for weight in weights[4:])
    for weight, want in zip(weights, twice, strict=True):
        assert (weight.grad - want).abs().max() < 1e-15
