"""Labels of feature maps, samplers, drawn negatives: against loops."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmseg.registry import MODELS

from mmseg_contrast import ops

CLASSES = 4
SAMPLERS = dict(
    all=dict(type='AllPixels'),
    batch=dict(type='PerClassRandom', number=3),
    image=dict(type='PerClassRandom', number=3, scope='image'),
    uncertain=dict(type='Uncertain', number=3, max_probability=.5),
    low_entropy=dict(type='LowEntropy', number=3, percent=60.),
    hard_easy=dict(type='HardEasy', max_samples=40, max_views=4))
fuzzed = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


def draw_labels(shape, seed, present=range(CLASSES), ignored=(255, -1, 9)):
    gen = torch.Generator().manual_seed(seed)
    choice = torch.tensor([*present, *ignored])
    return choice[torch.randint(len(choice), shape, generator=gen)]


def draw_logits(shape, seed, scale=2.):
    gen = torch.Generator().manual_seed(seed + 1)
    return scale * torch.randn(
        shape[0], CLASSES, *shape[1:], generator=gen)


def sample(kind, labels, seed=0, logits=None, **changes):
    sampler = MODELS.build({**SAMPLERS[kind], **changes})
    scores = sampler.draw(labels, torch.Generator().manual_seed(seed))
    if logits is None:
        logits = draw_logits(labels.shape, seed)
    return sampler(labels, scores, logits, CLASSES)


# Labels of a feature map


def slow_labels(labels, size, rule, min_ratio=.75):
    """Cell by cell, in Python."""
    (_, height, width), (rows, columns) = labels.shape, size
    out = torch.empty(len(labels), rows, columns, dtype=torch.long)
    for b, i, j in np.ndindex(*out.shape):
        if rule == 'nearest':
            out[b, i, j] = labels[b, math.floor(i * height / rows),
                                  math.floor(j * width / columns)]
            continue
        if rule == 'centre':
            out[b, i, j] = labels[b, math.floor((i + .5) * height / rows),
                                  math.floor((j + .5) * width / columns)]
            continue
        if rule == 'stride':
            out[b, i, j] = labels[b, ::math.ceil(height / rows)][i][
                ::math.ceil(width / columns)][j]
            continue
        down, right = height // rows, width // columns
        cell = labels[b, i * down:(i + 1) * down,
                      j * right:(j + 1) * right].flatten().tolist()
        cell = [c if 0 <= c < CLASSES else 255 for c in cell]
        best = max(sorted(set(cell)), key=cell.count)
        share = cell.count(best) / len(cell)
        out[b, i, j] = best if (
            rule == 'majority' or share >= min_ratio) else 255
    return out


@fuzzed
@given(cell=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       rule=st.sampled_from(
           ['nearest', 'centre', 'ratio', 'majority', 'stride']),
       ratio=st.sampled_from([0., .3, .5, .75, 1.]),
       seed=st.integers(0, 99))
def test_labels_at_whole_cells_equal_the_loops(cell, size, rule, ratio, seed):
    shape = (2, cell[0] * size[0], cell[1] * size[1])
    labels = draw_labels(shape, seed)
    before = labels.clone()
    got = ops.labels_at(labels, size, rule, CLASSES, ratio)
    assert got.dtype == torch.int64
    assert torch.equal(got, slow_labels(labels, size, rule, ratio))
    assert torch.equal(labels, before)


@pytest.mark.parametrize('sides', [
    (512, 65), (640, 160), (513, 129), (7, 3), (3, 7), (97, 24), (5, 1)])
@pytest.mark.parametrize('rule, mode', [
    ('nearest', 'nearest'), ('centre', 'nearest-exact')])
def test_nearest_labels_of_any_size(sides, rule, mode):
    labels = torch.arange(sides[0]).view(1, 1, -1).expand(1, 2, -1)
    got = ops.labels_at(labels, (1, sides[1]), rule, CLASSES)
    want = F.interpolate(labels[:, None].double(), (1, sides[1]), mode=mode)
    assert torch.equal(got, want[:, 0].long())
    turned = ops.labels_at(
        labels.transpose(1, 2), (sides[1], 1), rule, CLASSES)
    assert torch.equal(turned, got.transpose(1, 2))
    if rule == 'centre':  # the place of features that are resized so
        places = ops.centres(sides[1], sides[0])
        assert torch.equal(got[0, 0], places.floor().long())


def test_nearest_labels_are_exact_where_floats_are_not():
    # 41 / 82 of 256 is 128, for torch's float32 it is just below.
    labels = torch.arange(256).view(1, 1, -1)
    got = ops.labels_at(labels, (1, 82), 'nearest', CLASSES)
    assert got[0, 0, 41] == 128
    assert F.interpolate(labels[None].float(), (1, 82))[0, 0, 0, 41] == 127


def test_strided_labels_of_a_strided_convolution():
    labels = draw_labels((1, 13, 9), 0)
    got = ops.labels_at(labels, (4, 3), 'stride', CLASSES)
    assert torch.equal(got, labels[:, ::4, ::3])


def test_of_most_frequent_labels_the_ignored_one_may_win():
    labels = torch.tensor([[[0, 255, 1, 255, 2, 2], [1, 9, 0, 255, 2, 3]]])
    # Half of a cell against a quarter; then half against a quarter each.
    assert ops.labels_at(
        labels, (1, 3), 'majority', CLASSES)[0].tolist() == [[255, 255, 2]]
    labels = torch.tensor([[[1, 255], [255, 1]]])
    assert ops.labels_at(labels, (1, 1), 'majority', CLASSES).item() == 1


@pytest.mark.parametrize('rule', ['ratio', 'majority'])
@pytest.mark.parametrize('size', [(16, 13), (13, 16), (64, 32)])
def test_cells_that_are_not_whole_are_a_clear_mistake(rule, size):
    labels = torch.zeros(1, 32, 32).long()
    with pytest.raises(
            ValueError, match=f"{rule}.*32 x 32.*{size[0]} x {size[1]}.*"
            "crop_size.*nearest"):
        ops.labels_at(labels, size, rule, CLASSES)


def test_other_mistakes_of_labels():
    labels = torch.zeros(1, 10, 10).long()
    with pytest.raises(ValueError, match="'stride'.*crop_size"):
        ops.labels_at(labels, (6, 10), 'stride', CLASSES)
    with pytest.raises(ValueError, match=r"label_downscale\.rule = 'area'"):
        ops.labels_at(labels, (5, 5), 'area', CLASSES)
    with pytest.raises(ValueError, match=r'label_downscale\.min_ratio = 75'):
        ops.labels_at(labels, (5, 5), 'ratio', CLASSES, 75)


# Samplers


def check_anchors(anchors, labels):
    """Own labels, no pixel twice, no ignored one, a static number."""
    flat = labels.flatten()
    filled = anchors.labels != 255
    chosen = anchors.index[filled]
    assert anchors.index.dtype == anchors.labels.dtype == torch.int64
    assert ((anchors.index >= 0) & (anchors.index < len(flat))).all()
    assert torch.equal(flat[chosen], anchors.labels[filled])
    assert ((anchors.labels[filled] >= 0)
            & (anchors.labels[filled] < CLASSES)).all()
    assert len(chosen.unique()) == len(chosen)
    return chosen


@pytest.mark.parametrize('kind', SAMPLERS)
@fuzzed
@given(shape=shapes, seed=st.integers(0, 99))
def test_anchors_are_pixels_of_their_class(kind, shape, seed):
    labels = draw_labels(shape, seed)
    anchors = sample(kind, labels, seed)
    chosen = check_anchors(anchors, labels)
    slots = dict(all=labels.numel(), image=3 * CLASSES * shape[0],
                 hard_easy=40).get(kind, 3 * CLASSES)
    assert anchors.index.shape == anchors.labels.shape == (slots, )
    images = torch.arange(shape[0]).repeat_interleave(shape[1] * shape[2])
    for c in range(CLASSES):
        mine = labels.flatten()[chosen] == c
        there = (labels == c).flatten()
        if kind == 'all':
            assert mine.sum() == there.sum()
        elif kind == 'batch':
            assert mine.sum() == min(3, there.sum())
        elif kind == 'image':
            for b in range(shape[0]):
                assert (mine & (images[chosen] == b)).sum() == min(
                    3, (there & (images == b)).sum())
        elif kind == 'hard_easy':
            for b in range(shape[0]):
                number = (there & (images == b)).sum()
                assert (mine & (images[chosen] == b)).sum() == (
                    0 if number <= 4 else min(4, max(1, 40 // len(
                        pairs_of(labels, 4)))))
        else:
            assert mine.sum() <= 3


@pytest.mark.parametrize('kind', SAMPLERS)
def test_nothing_is_chosen_of_ignored_pixels(kind):
    anchors = sample(kind, torch.full((2, 5, 5), 255))
    assert anchors.labels.eq(255).all() and len(anchors.labels) > 0
    # Also where a class's own number is the ignored one.
    labels = torch.zeros(2, 5, 5).long()
    labels[0] = 2
    sampler = MODELS.build(SAMPLERS[kind])
    scores = sampler.draw(labels, torch.Generator().manual_seed(0))
    anchors = sampler(labels, scores, draw_logits((2, 5, 5), 0), CLASSES, 2)
    assert set(anchors.labels.tolist()) <= {0, 2}
    assert (anchors.index[anchors.labels == 0] >= 25).all()


@pytest.mark.parametrize('kind', ['batch', 'image', 'uncertain', 'hard_easy'])
def test_each_pixel_is_chosen_equally_often(kind):
    labels = torch.zeros(1, 4, 5).long()
    labels[0, :, 3:] = 1
    logits = torch.zeros(1, CLASSES, 4, 5)
    if kind == 'hard_easy':  # all hard, or it would be by halves
        logits[:, 3] = 1
    counts = torch.zeros(20)
    gen = torch.Generator().manual_seed(0)
    sampler = MODELS.build(SAMPLERS[kind])
    for _ in range(1000):
        anchors = sampler(labels, sampler.draw(labels, gen), logits, CLASSES)
        chosen = anchors.index[anchors.labels != 255]
        counts[chosen] += 1
    share = counts.view(4, 5) / 1000
    number = 4 if kind == 'hard_easy' else 3
    # Four standard deviations of 1000 draws.
    assert (share[:, :3] - number / 12).abs().max() < .065
    assert (share[:, 3:] - number / 8).abs().max() < .065


def test_scores_are_uniform_numbers_of_the_generator():
    labels = torch.zeros(2, 3, 4).long()
    sampler = MODELS.build(SAMPLERS['batch'])
    one, two = (sampler.draw(labels, torch.Generator().manual_seed(5))
                for _ in range(2))
    assert torch.equal(one, two) and one.shape == (24, )
    assert one.dtype == torch.float32 and one.unique().numel() == 24
    assert MODELS.build(SAMPLERS['all']).draw(
        labels, torch.Generator()).numel() == 0


def test_uncertain_pixels_have_a_low_probability_of_their_class():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 255]]])
    chance = torch.tensor([.2, .5, .51, .1, .9, .1])
    probs = ((1 - chance) / 3).expand(CLASSES, -1).clone()
    probs[labels[0, 0].clamp_max(1), torch.arange(6)] = chance
    anchors = sample('uncertain', labels, logits=probs.log().view(1, 4, 1, 6),
                     max_probability=.505)
    chosen = anchors.index[anchors.labels != 255]
    assert sorted(chosen.tolist()) == [0, 1, 3]


def test_reliable_pixels_have_a_low_entropy_and_a_probable_class():
    shape = (2, 6, 7)
    logits = draw_logits(shape, 3)
    labels = logits.argmax(1)  # most are right
    labels[:, :3] = draw_labels((2, 3, 7), 3)
    anchors = sample('low_entropy', labels, 0, logits, number=84)
    probs = logits.softmax(1)
    entropy = -(probs * probs.log()).sum(1)
    known = (labels >= 0) & (labels < CLASSES)
    limit = np.percentile(entropy[known].numpy(), 60)
    own = probs.gather(1, labels.clamp(0, 3).unsqueeze(1)).squeeze(1)
    want = known & (entropy <= limit) & (own > .3)
    chosen = check_anchors(anchors, labels)
    assert sorted(chosen.tolist()) == want.flatten().nonzero(
        ).flatten().tolist()
    assert len(chosen) > 20
    for part in (known & (own > .3), known & (entropy <= limit),
                 (entropy <= limit) & (own > .3)):
        assert len(chosen) < part.sum()  # each of the three matters


def test_a_low_entropy_becomes_rare_in_the_course_of_training():
    sampler = MODELS.build(dict(type='LowEntropy'))
    shares = []
    for progress in (0, .25, 1):
        sampler.set_progress(progress)
        shares.append(sampler.percent)
    assert shares == [20, 15, 0]
    fixed = MODELS.build(dict(type='LowEntropy', anneal=False))
    fixed.set_progress(.5)
    assert fixed.percent == 20
    MODELS.build(SAMPLERS['batch']).set_progress(.5)


# Hard and easy


def pairs_of(labels, max_views):
    return [(b, c) for b in range(len(labels)) for c in range(CLASSES)
            if (labels[b] == c).sum() > max_views]


def slow_hard_easy(labels, predicted, scores, max_samples, max_views):
    """Row by row, with the three published cases."""
    scores = scores.view_as(labels)
    rows = pairs_of(labels, max_views)
    number = min(max(1, max_samples // max(1, len(rows))), max_views)
    chosen = []
    for b, c in rows:
        kinds = [((labels[b] == c) & ((predicted[b] == c) == easy)).flatten(
            ).nonzero().flatten().tolist() for easy in (False, True)]
        hard, easy = (sorted(kind, key=lambda p: -scores[b].flatten()[p])
                      for kind in kinds)
        if len(hard) >= number / 2 and len(easy) >= number / 2:
            first = number // 2
        elif len(hard) >= number / 2:
            first = number - len(easy)
        else:
            first = len(hard)
        if number == 1:  # the published one is never hard
            first = min(1, len(hard))
        size = labels[0].numel()
        chosen += [b * size + p for p in
                   hard[:first] + easy[:number - first]]
    return chosen[:max_samples]


@fuzzed
@given(shape=shapes, seed=st.integers(0, 99), samples=st.integers(1, 60),
       views=st.integers(1, 9), wrong=st.sampled_from([0., .2, .5, .9, 1.]))
def test_hard_and_easy_equal_the_loops(shape, seed, samples, views, wrong):
    labels = draw_labels(shape, seed)
    gen = torch.Generator().manual_seed(seed)
    miss = torch.rand(shape, generator=gen) < wrong
    predicted = torch.where(miss, (labels + 1) % CLASSES, labels)
    scores = torch.rand(labels.numel(), generator=gen)
    index, mine = ops.hard_and_easy(
        labels, predicted, scores, CLASSES, samples, views)
    want = slow_hard_easy(labels, predicted, scores, samples, views)
    number = len(want)
    assert len(index) == len(mine) == samples
    assert index[:number].tolist() == want
    assert torch.equal(mine[:number], labels.flatten()[index[:number]])
    assert mine[number:].eq(255).all() and index[number:].eq(0).all()


# Entropy


@fuzzed
@given(count=st.integers(1, 50), valid=st.integers(0, 50),
       percent=st.one_of(st.floats(0, 100), st.integers(0, 100)),
       seed=st.integers(0, 99))
def test_percentiles_equal_numpy(count, valid, percent, seed):
    gen = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=gen, dtype=torch.float64)
    there = torch.randperm(count, generator=gen) < valid
    got = ops.entropy_threshold(values, there, percent)
    if not there.any():
        assert got == math.inf
        return
    want = np.percentile(values[there].numpy(), percent)
    assert got.item() == pytest.approx(want, rel=1e-12)
    assert torch.equal(got, ops.entropy_threshold(
        values, there, torch.tensor(percent, dtype=torch.float64)))


def test_entropy_of_certain_and_of_uniform_pixels():
    logits = torch.zeros(1, 4, 1, 2)
    logits[0, 1, 0, 0] = 1000
    assert ops.pixel_entropy(logits)[0, 0].tolist() == [
        0, pytest.approx(math.log(4))]
    assert ops.pixel_entropy(logits.bfloat16()).dtype == torch.float32


def test_probability_of_the_own_class():
    logits = torch.tensor([0., 1, 2, 3]).view(1, 4, 1, 1).expand(1, 4, 1, 4)
    labels = torch.tensor([[[2, 0, 255, -1]]])
    got = ops.own_probability(logits.bfloat16(), labels)
    assert got.dtype == torch.float32
    want = torch.tensor([2., 0]).exp() / torch.arange(4.).exp().sum()
    torch.testing.assert_close(got[0, 0], F.pad(want, (0, 2)))


# Classes of unreliable pixels


def test_members_equal_the_loops():
    shape = (3, 4, 5)
    labels = draw_labels(shape, 0)
    probs = draw_logits(shape, 0).softmax(1)
    gen = torch.Generator().manual_seed(0)
    high = torch.rand(shape, generator=gen) < .5
    labelled = torch.tensor([True, False, True])
    got = ops.unreliable_class_members(probs, labels, high, labelled, 2, 3)
    assert got.shape == probs.shape
    for b, i, j in np.ndindex(*shape):
        order = probs[b, :, i, j].argsort(descending=True).tolist()
        label = labels[b, i, j].item()
        if labelled[b]:
            want = set(order[:2]) - {label} if 0 <= label < 4 else set()
        else:
            want = set(order[2:3]) if high[b, i, j] else set()
        assert set(got[b, :, i, j].nonzero().flatten().tolist()) == want
    assert got.sum((0, 2, 3)).gt(0).all()
    # A labelled pixel that is wrong is a key of two classes.
    assert got[0].sum(0).max() == 2


def test_members_go_to_the_queues_of_all_their_classes():
    vectors = torch.arange(6.).unsqueeze(1)
    members = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0],
                            [0, 0, 0, 0, 0, 0]]) > 0
    keys = torch.zeros(3, 2, 1)
    pointer, filled = torch.zeros(3).long(), torch.zeros(3).long()
    scores = torch.tensor([.1, .9, 1., 1., .5, 1.])
    ops.push_members(keys, pointer, filled, vectors, members, scores, 2)
    assert filled.tolist() == [2, 1, 0] and pointer.tolist() == [0, 1, 0]
    assert keys[0].flatten().tolist() == [1, 4] and keys[1, 0] == 0
    ops.push_members(keys, pointer, filled, vectors[:0], members[:, :0],
                     scores[:0], 2)
    assert filled.tolist() == [2, 1, 0]


def test_one_class_each_is_what_queues_have_already():
    labels = draw_labels((40, ), 0)
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    members = labels == torch.arange(CLASSES).unsqueeze(1)
    for number in (2, 60):
        index, exists = ops.top_scored_members(members, scores, number)
        want = ops.top_scored(labels, scores, CLASSES, number)
        assert torch.equal(exists, want[1])
        assert torch.equal(index[exists], want[0][exists])


# Drawn negatives


def problem(seed=0, queries=9, negatives=5, keys=12, width=3):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 255, -1])[:queries]
    return dict(
        queries=normal(queries, width).requires_grad_(), labels=labels,
        means=normal(CLASSES, width),
        present=torch.tensor([True, True, True, False]),
        keys=normal(keys, width),
        negatives=torch.randint(
            keys, (queries, negatives), generator=gen),
        exists=torch.rand(queries, negatives, generator=gen) < .7)


def slow_sampled_loss(queries, labels, means, present, keys, negatives,
                      exists, tau):
    total = queries.sum() * 0
    for c in range(CLASSES):
        rows = (labels == c).nonzero().flatten().tolist()
        for a in rows:
            if not present[c]:
                continue
            chosen = [means[c], *(keys[n] for n, there in zip(
                negatives[a], exists[a], strict=True) if there)]
            logits = torch.stack([F.cosine_similarity(
                queries[a], one, dim=0) for one in chosen]) / tau
            total = total + F.cross_entropy(
                logits, torch.tensor(0)) / len(rows)
    return total / max(1, present.sum())


@pytest.mark.parametrize('chunk_size', [None, 1, 4])
def test_the_sampled_loss_equals_the_loops(chunk_size):
    data = problem()
    data['exists'][1] = False
    got = ops.sampled_contrast_loss(**data, tau=.3, chunk_size=chunk_size)
    want = slow_sampled_loss(**data, tau=.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(one, data['queries'])[0]
             for one in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    assert grads[0][5:].eq(0).all() and grads[0][:5].abs().sum() > 0


def test_gradient_of_the_sampled_loss():
    data = problem()
    queries = data.pop('queries')
    assert torch.autograd.gradcheck(
        lambda q: ops.sampled_contrast_loss(q, **data, chunk_size=2), queries)


def test_the_sampled_loss_without_anything_is_zero():
    for change in (dict(labels=torch.full((9, ), 255)),
                   dict(present=torch.zeros(CLASSES, dtype=torch.bool)),
                   dict(exists=torch.zeros(9, 5, dtype=torch.bool))):
        data = {**problem(), **change}
        loss = ops.sampled_contrast_loss(**data)
        grad, = torch.autograd.grad(loss, data['queries'])
        assert loss == 0 and grad.eq(0).all()


def test_the_sampled_loss_is_full_precision_inside_autocast():
    data = {name: one.detach().float() if one.is_floating_point() else one
            for name, one in problem().items()}
    want = ops.sampled_contrast_loss(**data, tau=.01)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = ops.sampled_contrast_loss(**data, tau=.01)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_the_sampled_loss_has_no_second_derivative():
    data = problem()
    grad = torch.autograd.grad(
        ops.sampled_contrast_loss(**data), data['queries'],
        create_graph=False)[0]
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match='second derivative'):
        torch.autograd.grad(ops.sampled_contrast_loss(**data),
                            data['queries'], create_graph=True)


def test_negatives_are_of_classes_that_are_alike():
    means = torch.tensor([[1., 0], [1, 1], [0, 1], [-1, 0], [1, .1]])
    key_labels = torch.tensor([2, 0, 255, 1, 3, 1, 2, -1, 2, 0])
    labels = torch.tensor([0, 1, 255])
    # Evenly spaced numbers: shares come out to within one of them.
    even = (torch.arange(100) + .5) / 100
    uniforms = torch.stack(torch.meshgrid(even, even, indexing='ij'))
    uniforms = uniforms.flatten(1).unsqueeze(1).expand(-1, 3, -1)
    index, exists = ops.similar_class_negatives(
        labels, key_labels, means, uniforms, .5)
    assert exists.tolist() == [[True] * 10000] * 2 + [[False] * 10000]
    for a, own in enumerate((0, 1)):
        others = [c for c in range(4) if c != own]  # class 4 has no key
        cosines = F.cosine_similarity(means[own], means[others])
        for c, share in zip(others, (cosines / .5).softmax(0), strict=True):
            mine = (key_labels == c).nonzero().flatten()
            for key in mine:
                assert (index[a] == key).float().mean().item() == (
                    pytest.approx(share.item() / len(mine), abs=.011))
        assert set(key_labels[index[a]].tolist()) == set(others)


def test_the_largest_and_the_smallest_draw_stay_inside():
    means = torch.randn(
        CLASSES, 3, generator=torch.Generator().manual_seed(0))
    key_labels = torch.arange(CLASSES).repeat_interleave(7)
    ends = torch.tensor([0., 1 - 2**-24])
    uniforms = torch.stack(torch.meshgrid(ends, ends, indexing='ij'))
    uniforms = uniforms.flatten(1).unsqueeze(1).expand(-1, CLASSES, -1)
    index, _ = ops.similar_class_negatives(
        torch.arange(CLASSES), key_labels, means, uniforms)
    assert index.tolist() == [[7, 13, 21, 27]] + [[0, 6, 21, 27]] * 2 + [
        [0, 6, 14, 20]]


def test_negatives_at_a_temperature_near_zero():
    # exp of the others' cosines over tau is 0 next to that of the own class.
    index, exists = ops.similar_class_negatives(
        torch.tensor([0, 1]), torch.arange(3), torch.eye(3),
        torch.tensor([.2, .8]).expand(2, 2, 2), 1e-4)
    assert exists.all() and index.tolist() == [[1, 2], [0, 2]]


def test_without_another_class_there_is_no_negative():
    key_labels = torch.tensor([1, 1, 255])
    _, exists = ops.similar_class_negatives(
        torch.tensor([1, 2]), key_labels, torch.eye(4), torch.zeros(2, 2, 3))
    assert exists.tolist() == [[False] * 3, [True] * 3]


def test_negatives_of_a_queue_are_those_of_the_class():
    labels = torch.tensor([2, 0, 1, 255])
    filled = torch.tensor([3, 0, 5])
    even = ((torch.arange(15) + .5) / 15).expand(4, -1)
    index, exists = ops.queue_negatives(labels, filled, 5, even)
    assert index[0].bincount(minlength=15).tolist() == [0] * 10 + [3] * 5
    assert index[1].bincount(minlength=15).tolist() == [5] * 3 + [0] * 12
    assert exists.all(1).tolist() == [True, True, False, False]
    assert not exists[2:].any()


def test_reco_draws_and_compares():
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(30, 3, generator=gen, dtype=torch.float64,
                           requires_grad=True)
    labels = draw_labels((30, ), 0, present=range(3))
    queries = torch.arange(8)
    mine = labels[:8].where(torch.arange(8) != 2, torch.tensor(255))
    uniforms = torch.rand(2, 8, 6, generator=gen)
    loss = ops.reco_loss(
        features, labels, queries, mine, uniforms, CLASSES, .4)
    count, means, _ = ops.class_moments(features.detach(), labels, CLASSES)
    negatives, exists = ops.similar_class_negatives(
        mine, labels, means, uniforms, .4)
    assert (labels[negatives] != mine.unsqueeze(1))[exists].all()
    want = slow_sampled_loss(features[:8], mine, means, count > 0,
                             features.detach(), negatives, exists, .4)
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(one, features)[0] for one in (loss, want)]
    torch.testing.assert_close(*grads)
    assert grads[0][8:].eq(0).all()  # means and negatives have none


def test_u2pl_compares_with_the_queue():
    data = problem()
    gen = torch.Generator().manual_seed(1)
    keys = torch.randn(CLASSES, 6, 3, generator=gen, dtype=torch.float64)
    filled = torch.tensor([4, 6, 0, 1])
    uniforms = torch.rand(9, 7, generator=gen)
    given = [data[name] for name in
             ('queries', 'labels', 'means', 'present')]
    loss = ops.u2pl_loss(*given, keys, filled, uniforms, .2)
    negatives, exists = ops.queue_negatives(
        data['labels'], filled, 6, uniforms)
    want = slow_sampled_loss(
        *given, keys.flatten(0, 1), negatives, exists, .2)
    torch.testing.assert_close(loss, want)


# Mistakes, ranks, devices


@pytest.mark.parametrize('config, match', [
    (dict(type='PerClassRandom', number=0), 'PerClassRandom.number'),
    (dict(type='PerClassRandom', scope='rank'), 'PerClassRandom.scope'),
    (dict(type='Uncertain', max_probability=97), 'Uncertain.max_prob'),
    (dict(type='LowEntropy', percent=120), r'LowEntropy.percent.*100\]'),
    (dict(type='LowEntropy', min_probability=-1), 'LowEntropy.min_prob'),
    (dict(type='HardEasy', max_views=0), 'HardEasy.max_views'),
    (dict(type='HardEasy', max_samples=0), 'HardEasy.max_samples')])
def test_arguments_out_of_range(config, match):
    with pytest.raises(ValueError, match=match):
        MODELS.build(config)


@pytest.mark.parametrize('kind', ['uncertain', 'low_entropy', 'hard_easy'])
def test_logits_that_are_missing_or_of_another_size(kind):
    sampler = MODELS.build(SAMPLERS[kind])
    assert sampler.needs_logits
    labels, scores = torch.zeros(1, 4, 4).long(), torch.rand(16)
    with pytest.raises(ValueError, match='needs the logits'):
        sampler(labels, scores, None, CLASSES)
    with pytest.raises(ValueError, match=r'\(1, 4, 4\).*\(1, 4, 8, 8\)'):
        sampler(labels, scores, torch.zeros(1, 4, 8, 8), CLASSES)


def test_logits_get_no_gradients():
    labels = torch.zeros(1, 4, 4).long()
    logits = draw_logits((1, 4, 4), 0).requires_grad_()
    for kind in SAMPLERS:
        anchors = sample(kind, labels, logits=logits)
        assert not anchors.labels.requires_grad


@pytest.mark.parametrize('changes', [
    dict(tau=0.), dict(tau=-1.), dict(chunk_size=0)])
def test_arguments_of_the_sampled_loss(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ops.sampled_contrast_loss(**problem(), **changes)


def run_rank(rank, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=(folder / 'meeting').as_uri(), rank=rank,
        world_size=2)
    values, valid, vectors, members, scores = ranks_data()
    limits = [ops.entropy_threshold(values[rank], valid[rank], percent)
              for percent in (0, 33.3, 100)]
    keys = torch.zeros(CLASSES, 5, 3)
    pointer, filled = (torch.zeros(CLASSES).long() for _ in range(2))
    ops.push_members(keys, pointer, filled, vectors[rank], members[rank],
                     scores[rank], 2)
    torch.save((limits, keys, pointer, filled), folder / f'{rank}.pth')
    torch.distributed.destroy_process_group()


def ranks_data():
    gen = torch.Generator().manual_seed(0)
    valid = torch.rand(2, 30, generator=gen) < .5
    return (torch.rand(2, 30, generator=gen), valid,
            torch.randn(2, 8, 3, generator=gen),
            torch.rand(2, CLASSES, 8, generator=gen) < .3,
            torch.rand(2, 8, generator=gen))


def test_two_ranks_agree(tmp_path):
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path, ), nprocs=2, join=False, daemon=True,
        start_method='fork')
    assert any(processes.join(timeout=20) for _ in range(3))
    results = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    values, valid, vectors, members, scores = ranks_data()
    for limit, percent in zip(results[0][0], (0, 33.3, 100), strict=True):
        assert limit.item() == pytest.approx(
            np.percentile(values[valid].numpy(), percent), rel=1e-6)
    keys = torch.zeros(CLASSES, 5, 3)
    pointer, filled = (torch.zeros(CLASSES).long() for _ in range(2))
    for rank in range(2):
        ops.push_members(keys, pointer, filled, vectors[rank],
                         members[rank], scores[rank], 2)
    assert filled.sum() > 8
    for result in results:
        assert result[0] == results[0][0]
        for got, want in zip(
                result[1:], (keys, pointer, filled), strict=True):
            assert torch.equal(got, want)


def test_nothing_asks_for_a_value(monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device='meta')

    def whole(*shape):
        return meta(*shape, dtype=torch.int64)

    for rule in ('nearest', 'ratio', 'majority', 'stride'):
        assert ops.labels_at(
            whole(2, 8, 8), (4, 4), rule, CLASSES).shape == (2, 4, 4)
    labels = whole(2, 4, 4)
    for kind, config in SAMPLERS.items():
        sampler = MODELS.build(config)
        scores = sampler.draw(labels, torch.Generator())
        assert scores.device.type == 'meta', kind
        anchors = sampler(labels, scores, meta(2, 4, 4, 4), CLASSES)
        assert anchors.index.is_meta and anchors.labels.is_meta
    members = ops.unreliable_class_members(
        meta(2, 4, 4, 4), labels, meta(2, 4, 4) > 0, meta(2) > 0)
    ops.push_members(
        meta(4, 5, 3), whole(4), whole(4), meta(32, 3),
        members.transpose(0, 1).flatten(1), meta(32), 2)
    features = meta(32, 3).requires_grad_()
    mine = (features, labels.flatten())
    ops.reco_loss(*mine, anchors.index, anchors.labels,
                  meta(2, 40, 6), CLASSES).backward()
    ops.u2pl_loss(*mine, meta(4, 3), meta(4) > 0, meta(4, 5, 3), whole(4),
                  meta(32, 6)).backward()


def test_shapes_alone_decide_what_is_compiled():
    # One graph for any labels: no break, no second compilation.
    sampler, graphs = MODELS.build(SAMPLERS['hard_easy']), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(sampler, fullgraph=True, backend=count)
    for seed, present in ((0, range(CLASSES)), (1, (2, )), (2, ())):
        labels = draw_labels((2, 6, 6), seed, present)
        scores = sampler.draw(labels, torch.Generator().manual_seed(0))
        logits = draw_logits((2, 6, 6), seed)
        got = compiled(labels, scores, logits, CLASSES)
        want = sampler(labels, scores, logits, CLASSES)
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.labels, want.labels)
    assert len(graphs) == 1
