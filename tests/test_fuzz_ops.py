"""Tensor functions at any size, type and degenerate input.

What must hold: finite numbers in, finite numbers and gradients out, whatever
labels there are; what is not finite stays where it came in; and a loss that
is finite has finite gradients, so that no NaN gets into weights unseen.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import (
    DTYPES,
    HALF,
    IGNORE,
    LABELS,
    NAN,
    POISON,
    SEEDS,
    TAUS,
    Draw,
    finite,
    fuzz,
    gradients,
)
from mmseg_contrast import ops
from mmseg_contrast.ops.labels import ignored_last

SIDES = st.integers(1, 9)
BATCH = st.integers(1, 3)
CLASSES = st.integers(1, 5)
SMALL = st.integers(0, 6)
DIMS = st.integers(1, 5)


# -- labels ----------------------------------------------------------------


@fuzz(60)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, SIDES,
       st.sampled_from(['batch', 'sample']), st.booleans())
def test_fuzz_class_mix(seed, kind, samples, classes, height, width, scope,
                        mix_ignore):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, samples, height, width)
    present = ops.present_classes(labels, classes, scope, mix_ignore)
    chosen = ops.choose_classes(
        present, draw.uniform(samples, classes + 1))
    assert not (chosen & ~present).any()
    assert torch.equal(chosen.sum(1), (present.sum(1) + 1) // 2)
    mask = ops.class_mask(labels, chosen)
    ids = ignored_last(labels, classes)
    assert torch.equal(mask, torch.stack([
        row[one] for row, one in zip(chosen, ids, strict=True)]))


@fuzz(40)
@given(SEEDS, POISON, BATCH, SIDES, SIDES, DTYPES)
def test_fuzz_mixing_keeps_what_is_not_finite_in_its_place(
        seed, poison, samples, height, width, dtype):
    draw = Draw(seed)
    mask = draw.chance(samples, height, width)
    over, under = (draw.normal(samples, 3, height, width, dtype=dtype)
                   for _ in range(2))
    mixed = ops.mix(mask, over.clone().fill_(poison), under)
    assert torch.equal(~mixed.isfinite(),
                       mask.unsqueeze(1).expand_as(mixed))


@fuzz(60)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, SIDES, SIDES, SIDES,
       st.sampled_from(
           ['nearest', 'centre', 'ratio', 'majority', 'stride']),
       st.sampled_from([0., .5, .75, 1.]))
def test_fuzz_label_downscale(seed, kind, samples, classes, height, width,
                              rows, columns, rule, ratio):
    labels = Draw(seed).labels(kind, classes, samples, height, width)
    try:
        small = ops.labels_at(labels, (rows, columns), rule, classes, ratio)
    except ValueError as error:
        assert 'label_downscale' in str(error)
        return
    assert small.shape == (samples, rows, columns)
    assert set(small.unique().tolist()) <= {
        *labels.unique().tolist(), IGNORE}
    if kind == 'ignored':
        assert (small == IGNORE).all()


@fuzz(40)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, SIDES, SIDES, SIDES,
       st.integers(1, 4))
def test_fuzz_balanced_crop(seed, kind, samples, classes, height, width,
                            high, wide, tries):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, samples, height, width)
    size = (high, wide)
    if high > height or wide > width:
        with pytest.raises(ValueError, match='does not fit'):
            ops.draw_offsets(samples, tries, height, width, size,
                             draw.generator)
        return
    offsets = ops.draw_offsets(
        samples, tries, height, width, size, draw.generator)
    counts = ops.box_counts(labels, offsets, size, classes)
    known = ignored_last(labels, classes) < classes
    for i, (top, left) in enumerate(offsets[:, 0].tolist()):
        inside = known[i, top:top + high, left:left + wide]
        assert counts[i, 0].sum() == inside.sum()
    assert finite(ops.balance_scores(counts))
    chosen = ops.choose_offsets(labels, offsets, size, classes)
    windows = ops.crop_windows(labels, chosen, size)
    for one, window, (top, left) in zip(labels, windows, chosen.tolist(),
                                        strict=True):
        assert torch.equal(window, one[top:top + high, left:left + wide])


@fuzz(40)
@given(SEEDS, LABELS, st.integers(1, 30), CLASSES, st.integers(1, 5))
def test_fuzz_blocks_of_classes(seed, kind, number, classes, size):
    labels = Draw(seed).labels(kind, classes, number)
    index, exists, owner = ops.blocks_of_classes(labels, classes, size)
    known = ignored_last(labels, classes) < classes
    assert exists.sum() == known.sum()
    there = index[exists]
    assert len(there.unique()) == len(there)
    assert torch.equal(
        labels[there], owner.unsqueeze(1).expand_as(index)[exists])


# -- images ----------------------------------------------------------------


@fuzz(40)
@given(SEEDS, BATCH, SIDES, SIDES, DTYPES, st.sampled_from([0., .2, 1.]))
def test_fuzz_color_jitter(seed, samples, height, width, dtype, strength):
    draw = Draw(seed)
    images = draw.uniform(samples, 3, height, width, dtype=dtype)
    factors = (strength * (2 * draw.uniform(samples, 4) - 1)
               + torch.tensor([1., 1., 1., 0.])).to(dtype)
    order = draw.uniform(samples, 4).argsort(1)
    # grey, black and white have no hue
    images[0] = torch.tensor([0., 1., .5])[draw.integers(3, 1)].to(dtype)
    jittered = ops.color_jitter(images, factors, order)
    assert finite(jittered) and jittered.shape == images.shape
    slack = 0.02 if dtype in HALF else 1e-5
    assert jittered.min() >= -slack and jittered.max() <= 1 + slack


@fuzz(40)
@given(SEEDS, POISON, st.integers(2, 3), st.integers(7, 9),
       st.integers(7, 9))
def test_fuzz_augmentation_of_one_image_leaves_the_others_alone(
        seed, poison, samples, height, width):
    draw = Draw(seed)
    images = draw.uniform(samples, 3, height, width)
    factors = draw.uniform(samples, 4) + torch.tensor([.5, .5, .5, -.5])
    order = draw.uniform(samples, 4).argsort(1)
    sigma = .15 + draw.uniform(samples)
    broken = images.clone()
    broken[0, draw.integers(3, 1), 1, 2] = poison

    def augmented(one):
        return ops.gaussian_blur(
            ops.color_jitter(one, factors, order), sigma, (3, 3))

    assert torch.equal(augmented(broken)[1:], augmented(images)[1:])
    # A NaN is seen by all within the blur's reach, and by nobody else.
    away = augmented(broken)[0, :, 5:, 6:]
    assert torch.equal(away, augmented(images)[0, :, 5:, 6:])


@fuzz(30)
@given(SEEDS, BATCH, SIDES, SIDES, DTYPES, st.integers(0, 9),
       st.integers(0, 9))
def test_fuzz_blur(seed, samples, height, width, dtype, down, across):
    draw = Draw(seed)
    images = draw.uniform(samples, 3, height, width, dtype=dtype)
    sigma = .01 + 3 * draw.uniform(samples)
    radius = min(down, height - 1), min(across, width - 1)
    blurred = ops.gaussian_blur(images, sigma, radius)
    assert finite(blurred) and blurred.dtype == dtype
    slack = 0.02 if dtype in HALF else 1e-5
    assert blurred.min() >= images.min() - slack
    assert blurred.max() <= images.max() + slack


@fuzz(40)
@given(SEEDS, BATCH, SIDES, SIDES, st.integers(1, 12),
       st.sampled_from([0., .5, 1.]), DTYPES)
def test_fuzz_block_mask(seed, samples, height, width, block, ratio, dtype):
    draw = Draw(seed)
    uniforms = draw.uniform(
        samples, *ops.block_grid(height, width, block))
    images = 1 + draw.uniform(samples, 3, height, width, dtype=dtype)
    hidden = ops.hide_blocks(images, uniforms, ratio)
    visible = ops.block_mask(uniforms, height, width, ratio)
    assert torch.equal(hidden != 0, visible.unsqueeze(1).expand_as(hidden))
    if ratio == 1:
        assert not visible.any()


@fuzz(40)
@given(SEEDS, BATCH, CLASSES, SIDES, SIDES, SIDES, SIDES, st.integers(1, 4),
       DTYPES)
def test_fuzz_sliding_windows(seed, samples, classes, height, width, high,
                              wide, limit, dtype):
    draw = Draw(seed)
    stride = (1 + high // 2, 1 + wide // 2)
    boxes = ops.slide_boxes(height, width, (high, wide), stride)
    images = draw.normal(samples, classes, height, width, dtype=dtype)
    merged = ops.slide_windows(
        lambda part, of: part, images, boxes, limit)
    wider = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        merged, images.to(wider), rtol=1e-5, atol=1e-6)


@fuzz(30)
@given(SEEDS, BATCH, CLASSES, SIDES, SIDES, SIDES, SIDES, DTYPES)
def test_fuzz_resampling(seed, samples, channels, height, width, rows,
                         columns, dtype):
    draw = Draw(seed)
    maps = draw.normal(samples, channels, height, width, dtype=dtype)
    places = [ops.centres(rows, height) / height,
              ops.centres(columns, width) / width]
    there = ops.bilinear_at(maps, *places)
    assert there.shape == (samples, channels, rows, columns)
    assert finite(there)
    assert there.max() <= maps.max() + 1e-4
    assert there.min() >= maps.min() - 1e-4


@fuzz(30)
@given(SEEDS, BATCH, CLASSES, st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 3), st.booleans())
def test_fuzz_fusion_of_resolutions(seed, samples, classes, height, width,
                                    factor, align):
    draw = Draw(seed)
    context = draw.normal(samples, classes, height, width)
    attention = draw.uniform(samples, 1, height, width)
    top, left = (int(draw.integers(side, 1)) for side in (height, width))
    box = tuple(factor * edge for edge in (
        top, top + 1, left, left + 1))
    detail = draw.normal(samples, classes, factor, factor)
    fused = ops.fuse_detail(
        context, detail, attention, box, factor, align)
    assert fused.shape[2:] == (height * factor, width * factor)
    assert finite(fused)


# -- pseudo-labels ---------------------------------------------------------


@fuzz(50)
@given(SEEDS, BATCH, CLASSES, SIDES, SIDES, DTYPES,
       st.sampled_from([0., 1e-30, 1., 1e4]))
def test_fuzz_probabilities(seed, samples, classes, height, width, dtype,
                            scale):
    draw = Draw(seed)
    logits = draw.normal(
        samples, classes, height, width, dtype=dtype, scale=scale)
    probs = ops.logit_probabilities(logits)
    assert finite(probs)
    assert torch.allclose(
        probs.sum(1).float(), torch.ones(samples, height, width), atol=1e-5)
    scores = draw.uniform(*logits.shape, dtype=dtype) * scale
    scores[:, :, 0] = 0
    shared = ops.normalized(scores)
    assert finite(shared) and (shared[:, :, 0] == 0).all()


@fuzz(50)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, SIDES, DTYPES, POISON,
       st.sampled_from([2, 64, 4096]), st.sampled_from([.1, .5, 1.]),
       st.sampled_from([0., .9, 1.]))
def test_fuzz_thresholds(seed, kind, samples, classes, height, width, dtype,
                         poison, bins, portion, ceiling):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, samples, height, width)
    confidence = draw.uniform(samples, height, width, dtype=dtype)
    broken = draw.chance(samples, height, width)
    known = (ignored_last(labels, classes) < classes) & ~broken
    counts = ops.confidence_histogram(
        confidence.masked_fill(broken, poison), labels, classes, bins)
    # what is no number has no place among the confidences
    assert counts.sum() == known.sum()
    thresholds = ops.class_thresholds(counts, portion, ceiling)
    assert finite(thresholds)
    assert (0 <= thresholds).all() and (thresholds <= ceiling).all()
    for scope in ('batch', 'local', 'sample'):
        share = ops.confident_fraction(
            confidence.masked_fill(broken, NAN), ceiling, scope)
        assert finite(share)
        assert (share <= (~broken).float().mean((1, 2)).max()).all()


@fuzz(40)
@given(SEEDS, BATCH, CLASSES, SIDES, SIDES, DTYPES, POISON, st.booleans())
def test_fuzz_labels_over_thresholds(seed, samples, classes, height, width,
                                     dtype, poison, ratio):
    draw = Draw(seed)
    probs = draw.probabilities(samples, classes, height, width, dtype=dtype)
    thresholds = draw.uniform(classes).round(decimals=1)
    clean = ops.over_thresholds(probs, thresholds, ratio)
    broken = draw.chance(samples, height, width)
    labels, confidence, sure = ops.over_thresholds(
        probs.masked_fill(broken.unsqueeze(1), poison), thresholds, ratio)
    for mine, theirs in zip((labels, confidence, sure), clean, strict=True):
        assert torch.equal(mine[~broken], theirs[~broken])
    assert not sure[broken].any()


# -- prototypes ------------------------------------------------------------


@fuzz(50)
@given(SEEDS, LABELS, BATCH, CLASSES, DIMS, SIDES, DTYPES, POISON,
       st.integers(1, 12))
def test_fuzz_image_class_means(seed, kind, samples, classes, channels, side,
                                dtype, poison, least):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, samples, side, side)
    features = draw.normal(samples, channels, side, side, dtype=dtype)
    want, there = ops.image_class_means(features, labels, classes, least)
    assert finite(want) and (want[~there] == 0).all()
    # one pixel that is no number spoils one mean
    features[0, :, 0, 0] = poison
    means, exists = ops.image_class_means(features, labels, classes, least)
    assert finite(means)
    spoilt = torch.zeros_like(there)
    if 0 <= labels[0, 0, 0] < classes:
        spoilt[labels[0, 0, 0], 0] = True
    assert torch.equal(exists, there & ~spoilt)
    torch.testing.assert_close(means[exists], want[exists])


@fuzz(40)
@given(SEEDS, CLASSES, DIMS, st.integers(1, 4), st.integers(0, 5),
       st.sampled_from([1e-4, .5, 1.]))
def test_fuzz_moved_prototypes(seed, classes, channels, number, until,
                               momentum):
    draw = Draw(seed)
    prototypes = draw.normal(classes, channels)
    count = draw.integers(4, classes)
    new = draw.normal(classes, number, channels)
    exists = draw.chance(classes, number)
    moved, after = ops.moved_prototypes(
        prototypes, count, new, exists, momentum, until)
    assert torch.equal(after, count + exists.sum(1))
    for c in range(classes):
        want, seen = prototypes[c], int(count[c])
        for k in range(number):
            if exists[c, k]:
                share = 1 / (seen + 1) if seen < max(until, 1) else momentum
                want = (1 - share) * want + share * new[c, k]
                seen += 1
        torch.testing.assert_close(moved[c], want, rtol=1e-4, atol=1e-5)


@fuzz(40)
@given(SEEDS, BATCH, CLASSES, DIMS, SIDES, DTYPES,
       st.sampled_from([.1, 1., 50.]))
def test_fuzz_prototype_scores(seed, samples, classes, channels, side, dtype,
                               temperature):
    draw = Draw(seed)
    features = draw.normal(samples, channels, side, side, dtype=dtype
                           ).requires_grad_()
    prototypes = draw.normal(classes, channels)
    with torch.no_grad():  # a pixel at the prototype itself
        features[0, :, 0, 0] = prototypes[0].to(dtype)
    exists = draw.chance(classes)
    near = ops.prototype_scores(features, prototypes, exists, temperature)
    assert not near.isnan().any()
    torch.testing.assert_close(
        near.exp().sum(1), torch.ones_like(near[:, 0]),
        rtol=1e-4, atol=1e-4)
    loss = ops.prototype_consistency(near, ops.prototype_scores(
        features.detach().flip(2), prototypes, exists, temperature))
    assert finite(loss, *gradients(loss, features))


# -- losses ----------------------------------------------------------------


def vectors(draw, number, channels, dtype, kind):
    """Anchors or keys: unit, zero, all alike or large."""
    rows = draw.normal(number, channels)
    if kind == 'zero':
        rows = torch.zeros_like(rows)
    elif kind == 'alike':
        rows = rows[:1].expand_as(rows).clone() if number else rows
    elif kind == 'large':
        rows = rows * 100
    else:
        rows = torch.nn.functional.normalize(rows, dim=1)
    return rows.to(dtype).requires_grad_()


ROWS = st.sampled_from(['unit', 'zero', 'alike', 'large'])
OWN = st.sampled_from(['energy', 'positive'])
REDUCE = st.sampled_from(['mean', 'lse'])


@fuzz(100)
@given(SEEDS, LABELS, SMALL, CLASSES, SMALL, DIMS, DTYPES, ROWS, TAUS, OWN,
       REDUCE, st.sampled_from(['mean', 'lse']),
       st.sampled_from([None, 1, 3]), st.booleans())
def test_fuzz_class_contrast(seed, kind, number, classes, length, channels,
                             dtype, rows, tau, own, reduce_positives, energy,
                             chunk, weighted):
    draw = Draw(seed)
    anchors = vectors(draw, number, channels, dtype, rows)
    labels = draw.labels(kind, classes, number)
    keys = vectors(draw, classes * length, channels, torch.float32, rows)
    filled = draw.chance(classes, length)
    weights = draw.uniform(number).requires_grad_() if weighted else None
    loss = ops.class_contrast_loss(
        anchors, labels, keys.view(classes, length, channels), filled, tau,
        own=own, reduce_positives=reduce_positives, energy=energy,
        anchor_weights=weights, chunk_size=chunk)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert finite(loss)
    assert finite(*gradients(loss, anchors, keys))
    if kind == 'ignored':
        assert loss == 0


@fuzz(100)
@given(SEEDS, LABELS, LABELS, SMALL, SMALL, CLASSES, DIMS, DTYPES, ROWS,
       TAUS, OWN, REDUCE, st.booleans(), st.booleans(),
       st.sampled_from([None, 1, 3]))
def test_fuzz_pair_contrast(seed, kind, key_kind, number, more, classes,
                            channels, dtype, rows, tau, own, reduce_positives,
                            alone, weighted, chunk):
    draw = Draw(seed)
    anchors = vectors(draw, number, channels, dtype, rows)
    labels = draw.labels(kind, classes, number)
    keys, key_labels = anchors, labels
    if not alone:
        keys = vectors(draw, more, channels, dtype, rows)
        key_labels = draw.labels(key_kind, classes, more)
    weights = {}
    if weighted and reduce_positives == 'mean':
        weights = dict(anchor_weights=draw.uniform(number),
                       key_weights=draw.uniform(len(keys)))
    loss = ops.pair_contrast_loss(
        anchors, keys, ops.same_label(labels, key_labels), tau, own=own,
        reduce_positives=reduce_positives, exclude_self=alone,
        chunk_size=chunk, **weights)
    assert finite(loss, *gradients(loss, anchors, keys))
    if kind == 'ignored':
        assert loss == 0


@fuzz(60)
@given(SEEDS, LABELS, SMALL, CLASSES, SMALL, DTYPES, TAUS, OWN, REDUCE,
       st.sampled_from([1., 1e4]))
def test_fuzz_contrast_of_energies(seed, kind, number, classes, length,
                                   dtype, tau, own, reduce_positives, scale):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, number)
    energies = draw.normal(
        number, classes, dtype=dtype, scale=scale).requires_grad_()
    positives = draw.normal(
        number, length, dtype=dtype, scale=scale).requires_grad_()
    absent = [draw.chance(*one.shape) for one in (energies, positives)]
    loss = ops.contrast_loss(
        energies.masked_fill(absent[0], -float('inf')),
        positives.masked_fill(absent[1], -float('inf')), labels, own,
        reduce_positives=reduce_positives)
    assert finite(loss, *gradients(loss, energies, positives))


@fuzz(60)
@given(SEEDS, st.integers(2, 6), st.integers(2, 4), DIMS, TAUS, OWN,
       st.sampled_from(['class', 'mean', 'pair', 'prototype', 'gaussian',
                        'resolution', 'reco', 'regularizer']))
def test_fuzz_an_anchor_that_is_no_number_shows_in_the_loss(
        seed, number, classes, channels, tau, own, form):
    draw = Draw(seed)
    anchors = draw.normal(number, channels)
    labels = torch.arange(number) % 2  # both classes have a positive
    labels[draw.integers(number, 1)] = IGNORE
    labels = torch.cat([labels, torch.arange(4) % 2])
    anchors = torch.cat([anchors, draw.normal(4, channels)])
    anchors[-1 - int(draw.integers(4, 1)), 0] = NAN
    keys = draw.normal(classes, 2, channels)
    mean = keys[:, 0]
    if form in ('class', 'mean'):
        loss = ops.class_contrast_loss(
            anchors, labels, keys, torch.ones(classes, 2).bool(), tau,
            own=own, energy='mean' if form == 'mean' else 'lse')
    elif form == 'pair':
        loss = ops.pair_contrast_loss(
            anchors, anchors, ops.same_label(labels, labels), tau, own=own,
            exclude_self=True)
    elif form == 'resolution':
        loss = ops.resolution_contrast(
            anchors, labels, anchors.flip(1),
            torch.full((len(anchors), ), .5), None, tau)
    elif form == 'reco':
        loss = ops.reco_loss(
            anchors, labels, torch.arange(len(anchors)), labels,
            draw.uniform(2, len(anchors), 3), classes, tau)
    elif form == 'regularizer':
        loss = ops.contrast_regularizer(anchors, labels, mean, tau)
    else:
        energies = ops.prototype_energies(anchors, mean, tau)
        if form == 'gaussian':
            energies = ops.gaussian_energies(
                anchors, mean, keys[:, 1].square(), tau)
        loss = ops.contrast_loss(
            energies, ops.own_class(energies, labels), labels, own)
    assert not finite(loss)


@fuzz(40)
@given(SEEDS, LABELS, SMALL, SMALL, CLASSES, DIMS, DTYPES, ROWS, TAUS,
       st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_fuzz_mixed_negatives(seed, kind, number, more, classes, channels,
                              dtype, rows, tau, hardest, mixes, query_mixes):
    draw = Draw(seed)
    anchors = vectors(draw, number, channels, dtype, rows)
    keys = vectors(draw, more, channels, dtype, rows).detach()
    rule = ops.same_label(draw.labels(kind, classes, number),
                          draw.labels(kind, classes, more))
    index, count = ops.hardest_negatives(anchors, keys, rule, hardest)
    assert index.shape == (number, hardest)
    assert (count <= hardest).all() and (count >= 0).all()
    if not mixes + query_mixes:
        return
    energies = ops.mixed_energies(
        anchors, keys, index, count,
        draw.uniform(number, 3 * mixes + 2 * query_mixes), mixes,
        query_mixes, .5, tau)
    assert not energies.isnan().any() and not (energies == float('inf')).any()
    assert torch.equal(energies.isinf(), count == 0)
    loss = ops.contrast_loss(
        energies.new_zeros(number, 2), energies.new_zeros(number, 1),
        torch.zeros(number, dtype=torch.int64), extra=energies)
    assert finite(loss, *gradients(loss, anchors))


@fuzz(60)
@given(SEEDS, LABELS, LABELS, st.integers(1, 8), CLASSES, DIMS, DTYPES, ROWS,
       TAUS, st.integers(1, 4))
def test_fuzz_drawn_negatives(seed, kind, query_kind, number, classes,
                              channels, dtype, rows, tau, negatives):
    draw = Draw(seed)
    features = vectors(draw, number, channels, dtype, rows)
    labels = draw.labels(kind, classes, number)
    queries = draw.integers(number, number)
    query_labels = draw.labels(query_kind, classes, number)
    loss = ops.reco_loss(
        features, labels, queries, query_labels,
        draw.uniform(2, number, negatives), classes, tau)
    assert finite(loss, *gradients(loss, features))
    loss = ops.u2pl_loss(
        features, labels, draw.normal(classes, channels),
        draw.chance(classes), draw.normal(classes, 3, channels),
        draw.integers(4, classes), draw.uniform(number, negatives), tau)
    assert finite(loss, *gradients(loss, features))


@fuzz(60)
@given(SEEDS, LABELS, SMALL, CLASSES, DIMS, DTYPES, ROWS, TAUS,
       st.booleans(), st.booleans())
def test_fuzz_resolution_contrast(seed, kind, number, classes, channels,
                                  dtype, rows, tau, two, weighted):
    draw = Draw(seed)
    context = vectors(draw, number, channels, dtype, rows)
    detail = vectors(draw, number, channels, dtype, rows)
    attention = draw.uniform(number).requires_grad_()
    labels = draw.labels(kind, classes, number)
    loss = ops.resolution_contrast(
        context, labels, detail if two else None,
        attention if two else None,
        draw.uniform(number) if weighted else None, tau)
    assert finite(loss, *gradients(loss, context, detail, attention))
    if kind == 'ignored':
        assert loss == 0


@fuzz(30)
@given(SEEDS, SMALL, DIMS, DTYPES)
def test_fuzz_unit_vectors(seed, number, channels, dtype):
    draw = Draw(seed)
    rows = draw.normal(number, channels, dtype=dtype).requires_grad_()
    rows.data[draw.chance(number)] = 0
    there = rows.detach().norm(dim=1) > 0
    unit = ops.unit(rows)
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        unit.norm(dim=1), there.to(wide), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        unit, torch.nn.functional.normalize(rows.to(wide), dim=1))
    slopes = draw.normal(number, channels)
    grad, = gradients((unit * slopes).sum(), rows)
    assert finite(grad)
    # zeros have no direction: the gradient passes as it is
    assert torch.equal(grad[~there], slopes[~there].to(dtype))


@fuzz(50)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, DTYPES,
       st.sampled_from([1., 1e4]))
def test_fuzz_losses_of_wrong_labels(seed, kind, samples, classes, side,
                                     dtype, scale):
    draw = Draw(seed)
    logits = draw.normal(samples, classes, side, side, dtype=dtype,
                         scale=scale).requires_grad_()
    labels = draw.labels(kind, classes, samples, side, side)
    for loss in (ops.symmetric_cross_entropy(logits, labels),
                 ops.uniform_divergence(logits)):
        assert finite(loss, *gradients(loss, logits))
    features = draw.normal(samples, 3, side, side, dtype=dtype,
                           scale=min(scale, 1e2)).requires_grad_()
    reference = features.detach().clone()
    reference[0] += 1
    distance = ops.masked_feature_distance(
        features, reference, labels == 0)
    assert finite(distance, *gradients(distance, features))


# -- statistics, queues, samplers ------------------------------------------


@fuzz(50)
@given(SEEDS, LABELS, SMALL, CLASSES, DIMS, DTYPES, SMALL)
def test_fuzz_moments(seed, kind, number, classes, channels, dtype, more):
    draw = Draw(seed)
    parts = []
    for rows in (number, more):
        features = draw.normal(rows, channels, dtype=dtype)
        labels = draw.labels(kind, classes, rows)
        parts.append((features, labels, ops.class_moments(
            features, labels, classes)))
        assert finite(*parts[-1][2])
    merged = ops.merge_moments(parts[0][2], parts[1][2])
    whole = ops.class_moments(
        torch.cat([one[0] for one in parts]),
        torch.cat([one[1] for one in parts]), classes)
    for mine, theirs in zip(merged, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert finite(ops.class_variance(merged))


@fuzz(50)
@given(SEEDS, LABELS, SMALL, CLASSES, st.integers(1, 4),
       st.integers(1, 4), st.integers(1, 3))
def test_fuzz_queues(seed, kind, number, classes, length, taken, pushes):
    draw = Draw(seed)
    keys = torch.zeros(classes, length, 1)
    pointer = torch.zeros(classes, dtype=torch.int64)
    filled = torch.zeros(classes, dtype=torch.int64)
    want = [[] for _ in range(classes)]
    for turn in range(pushes):
        labels = draw.labels(kind, classes, number)
        rows = turn * 100 + torch.arange(number).float().view(-1, 1)
        scores = draw.uniform(number)
        index, exists = ops.top_scored(labels, scores, classes, taken)
        assert index.shape == exists.shape == (classes, taken)
        if not number:
            rows = torch.zeros(1, 1)
        ops.push(keys, pointer, filled, rows[index], exists)
        for c in range(classes):
            mine = [i for i in range(number) if labels[i] == c]
            mine.sort(key=lambda i: -float(scores[i]))  # noqa: B023
            want[c] += [float(rows[i]) for i in mine[:taken]]
            stored = keys[c, :filled[c], 0].tolist()
            assert sorted(stored) == sorted(want[c][-length:])


@fuzz(50)
@given(SEEDS, LABELS, BATCH, CLASSES, SIDES, DTYPES, st.integers(1, 5),
       st.booleans())
def test_fuzz_choice_of_pixels(seed, kind, samples, classes, side, dtype,
                               number, broken):
    draw = Draw(seed)
    labels = draw.labels(kind, classes, samples, side, side)
    logits = draw.normal(samples, classes, side, side, dtype=dtype)
    if broken:
        logits[0, :, 0, 0] = NAN
    known = ignored_last(labels, classes) < classes
    scores = draw.uniform(labels.numel())
    index, chosen = ops.hard_and_easy(
        labels, logits.argmax(1), scores, classes, 2 * number, number)
    there = chosen != IGNORE
    assert torch.equal(labels.flatten()[index[there]], chosen[there])
    assert len(index[there].unique()) == int(there.sum())
    index, exists = ops.draw_per_group(
        ignored_last(labels, classes).flatten(), scores, classes, number)
    mine = torch.arange(classes).unsqueeze(1).expand_as(index)
    assert torch.equal(labels.flatten()[index[exists]], mine[exists])
    entropy = ops.pixel_entropy(logits)
    threshold = ops.entropy_threshold(entropy, known, 50.)
    reliable = entropy[known & entropy.isfinite()]
    if len(reliable):
        assert reliable.min() <= threshold <= reliable.max()
    members = ops.unreliable_class_members(
        logits, labels, entropy > threshold, draw.chance(samples))
    assert members.shape == logits.shape


@fuzz(40)
@given(SEEDS, LABELS, SMALL, CLASSES, st.integers(1, 4), DTYPES,
       st.sampled_from([.001, .05, 1.]), st.integers(1, 5))
def test_fuzz_transport(seed, kind, number, classes, prototypes, dtype,
                        epsilon, iterations):
    draw = Draw(seed)
    labels = ignored_last(draw.labels(kind, classes, number), classes)
    near = draw.normal(number, prototypes, dtype=dtype).clamp(-1, 1)
    near[draw.chance(number)] = -float('inf')
    shares = ops.class_sinkhorn(near, labels, classes, iterations, epsilon)
    assert finite(shares)
    allowed = ~near.isinf().all(1)
    torch.testing.assert_close(
        shares.sum(1)[allowed], torch.ones(int(allowed.sum()),
                                           dtype=shares.dtype),
        rtol=1e-4, atol=1e-4)


@fuzz(30)
@given(SEEDS, st.integers(0, 6), st.sampled_from([0., .5, .999]), DTYPES)
def test_fuzz_ema(seed, tensors, alpha, dtype):
    draw = Draw(seed)
    teacher, student = ([draw.normal(3, dtype=dtype)
                         for _ in range(tensors)] for _ in range(2))
    want = [alpha * a + (1 - alpha) * b
            for a, b in zip(teacher, student, strict=True)]
    ops.ema_update(teacher, student, alpha)
    for mine, theirs in zip(teacher, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
