"""Rules and weights of pairs, the batch as a bank, and other libraries."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmseg.registry import MODELS

from mmseg_contrast import ops

ABSENT = -math.inf
EXACT = dict(rtol=1e-11, atol=1e-12)
CLASSES, WIDTH = 4, 5
SIZES = dict(num_classes=CLASSES, channels=WIDTH)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(
        shape, generator=generator(seed), dtype=torch.float64), dim=-1)


def integers(high, count, seed=0):
    return torch.randint(0, high, (count, ), generator=generator(seed))


def build(**config):
    return MODELS.build(dict(type='BatchBank', **{**SIZES, **config}))


def logsumexp(values):
    top = max(values, default=ABSENT)
    return top if top == ABSENT else top + math.log(
        sum(math.exp(v - top) for v in values))


def slow_terms(anchors, keys, relation, tau, own, reduce='mean',
               pair_weights=None):
    """Terms of the anchors that count, by their numbers."""
    each = {}
    for i in range(len(anchors)):
        s = (keys @ anchors[i] / tau).tolist()
        plus = [j for j in range(len(keys)) if relation(i, j) > 0]
        minus = [s[j] for j in range(len(keys)) if relation(i, j) < 0]
        if not plus:
            continue
        every = logsumexp([s[j] for j in plus])
        if reduce == 'lse':
            each[i] = logsumexp([every, *minus]) - every
            continue
        each[i] = sum(
            (1 if pair_weights is None else pair_weights[i, j].item()) * (
                logsumexp([every if own == 'energy' else s[j], *minus])
                - s[j]) for j in plus) / len(plus)
    return each


def slow_loss(*args, **kwargs):
    each = slow_terms(*args, **kwargs).values()
    return sum(each) / max(1, len(each))


def by_label(labels, key_labels):
    """Relation of two known labels; 0 with an ignored one."""
    def relation(i, j):
        a, b = labels[i].item(), key_labels[j].item()
        if not (0 <= a < CLASSES and 0 <= b < CLASSES):
            return 0
        return 1 if a == b else -1
    return relation


# Rules


def test_a_pair_is_positive_and_its_group_left_out():
    pairs, keys = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 0])
    groups = torch.tensor([5, 5, 6, 255])
    key_groups = torch.tensor([5, 5, 6, 6, 255])
    # 0 and 1 are of one group: neither positive nor negative.
    assert ops.same_pair(pairs, keys, groups, key_groups)(
        slice(0, 4)).tolist() == [
            [1, 0, -1, -1, 0], [0, 1, -1, -1, 0], [-1, -1, 1, 0, 0],
            [0] * 5]
    assert ops.same_pair(pairs, keys, groups, key_groups, 6)(
        slice(1, 3)).tolist() == [[0, 1, 0, 0, -1], [0] * 5]


@pytest.mark.parametrize('exclude_self', [False, True])
def test_the_teacher_says_what_is_related(exclude_self):
    teacher = unit(7, 3)
    labels = torch.tensor([0, 1, 2, 255, 1, 0, -1])
    for rows, number in ((slice(0, 7), 2), (slice(2, 5), 1),
                         (slice(0, 7), 9)):
        got = ops.teacher_topk(
            teacher, teacher, number, labels, labels, exclude_self)(rows)
        for place, i in enumerate(range(7)[rows]):
            there = [j for j in range(7) if labels[i] not in (255, -1)
                     and labels[j] not in (255, -1)
                     and not (exclude_self and i == j)]
            there.sort(key=lambda j: -(teacher[i] @ teacher[j]).item())
            want = [0] * 7
            for rank, j in enumerate(there):
                want[j] = 1 if rank < number else -1
            assert got[place].tolist() == want


@pytest.mark.parametrize('number', [1, 2, 4, 6])
def test_the_same_largest_features_are_similar(number):
    features = torch.tensor([
        [9., 8, 1, 2, 3, 0], [8, 9, 0, 1, 2, 3], [0, 1, 2, 3, 8, 9],
        [9, 1, 8, 2, 3, 0], [9, 8, 1, 3, 2, 0]])
    keys = features.flip(0)

    def largest(row):
        # CDAC's form: sorted numbers of the largest, compared one by one.
        return sorted(sorted(range(6), key=lambda d: -row[d])[:number])

    for rows in (slice(0, 5), slice(1, 3)):
        got = ops.same_top_features(features, keys, number)(rows)
        assert got.dtype == torch.int8
        assert got.tolist() == [
            [1 if largest(one) == largest(other) else -1
             for other in keys.tolist()] for one in features[rows].tolist()]


def test_agreement_is_the_binary_cross_entropy_of_all_pairs():
    p = torch.randn(5, CLASSES, generator=generator(0), dtype=torch.float64
                    ).softmax(1).requires_grad_()
    q = torch.randn(7, CLASSES, generator=generator(1), dtype=torch.float64
                    ).softmax(1).requires_grad_()
    labels, key_labels = integers(3, 5), integers(3, 7, seed=1)
    labels[2] = key_labels[4] = 255
    got = ops.pair_agreement_loss(
        p, q, ops.same_label(labels, key_labels))
    terms = []
    for i in range(5):
        for j in range(7):
            if labels[i] == 255 or key_labels[j] == 255:
                continue
            terms.append(F.binary_cross_entropy(
                (p[i] * q[j]).sum(), (labels[i] == key_labels[j]).double()))
    torch.testing.assert_close(got, sum(terms) / 24, rtol=0, atol=1e-6)
    assert len(terms) == 24
    slopes = torch.autograd.grad(got, [p, q], retain_graph=True)
    for one, other in zip(slopes, torch.autograd.grad(
            sum(terms) / 24, [p, q]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not slopes[0][2].any() and not slopes[1][4].any()


def test_agreement_without_a_pair_or_doubt_is_finite_and_connected():
    p = torch.eye(3).requires_grad_()
    nothing = ops.pair_agreement_loss(
        p, p, ops.same_label(torch.full((3, ), 255), torch.arange(3)))
    nothing.backward()
    assert nothing == 0 and not p.grad.any()
    # Sure and wrong in all pairs: -log(1e-7) each.
    wrong = ops.pair_agreement_loss(
        p, p, ops.same_label(torch.arange(3), torch.tensor([1, 2, 0])))
    wrong.backward()
    assert wrong.item() == pytest.approx(-2 / 3 * math.log(1e-7), rel=1e-3)
    assert p.grad.isfinite().all()


def test_a_rule_within_a_place_and_without_oneself():
    labels, keys = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])
    places, key_places = torch.tensor([3, 4, 4]), torch.tensor([3, 4, 3])
    rule = ops.within(ops.same_label(labels, keys), places, key_places)
    assert rule(slice(0, 3)).tolist() == [[1, 0, -1], [0, 1, 0], [0, -1, 0]]
    assert rule(slice(1, 2)).tolist() == [[0, 1, 0]]
    assert ops.except_self(rule)(slice(0, 3)).tolist() == [
        [0, 0, -1], [0, 0, 0], [0, -1, 0]]
    assert ops.except_self(rule)(slice(1, 3)).tolist() == [
        [0, 0, 0], [0, -1, 0]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(0, 12), keys=st.integers(0, 12),
       places=st.integers(1, 4), alone=st.booleans(), seed=st.integers(0, 99))
def test_weights_make_the_mean_one_over_places(
        count, keys, places, alone, seed):
    labels = integers(4, count, seed) - 1
    here = integers(places, count, seed + 1) * 1000
    key_labels, there = labels, here
    if not alone:
        key_labels = integers(4, keys, seed + 2) - 1
        there = integers(places, keys, seed + 3) * 1000
    weights = ops.place_weights(
        labels, here, key_labels, there, alone, torch.float64)
    counts = [
        labels[i].item() >= 0 and any(
            key_labels[j] == labels[i] and there[j] == here[i]
            and not (alone and i == j) for j in range(len(key_labels)))
        for i in range(count)]
    values = torch.rand(count, generator=generator(seed)).double()
    means = []
    for place in range(places):
        mine = [values[i].item() for i in range(count)
                if counts[i] and here[i] == place * 1000]
        means += [sum(mine) / len(mine)] if mine else []
    want = sum(means) / max(1, len(means))
    got = (values * weights).sum().item() / max(1, sum(counts))
    assert got == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert [w > 0 for w in weights] == counts


# The batch as a bank


def draw_batch(count=24, seed=0):
    labels = integers(CLASSES + 1, count, seed)
    labels[labels == CLASSES] = 255
    images = integers(3, count, seed + 1)
    blocks = images * 2 + integers(2, count, seed + 2)
    return unit(count, WIDTH, seed=seed + 3), labels, images, blocks


@pytest.mark.parametrize('own', ['energy', 'positive'])
@pytest.mark.parametrize('alone', [True, False])
@pytest.mark.parametrize('scope', [
    'batch', 'image', 'positives_across_images', 'block'])
def test_scopes_equal_the_loops(scope, alone, own):
    bank = build(scope=scope, chunk_size=5, skip_classes=(0, ),
                 block_size=32 if scope == 'block' else None)
    anchors, labels, images, blocks = draw_batch()
    anchors.requires_grad_()
    keys, key_labels, key_images, key_blocks = (
        (anchors, labels, images, blocks) if alone else draw_batch(9, 7))
    label_rule = by_label(
        labels.where(labels != 0, torch.tensor(255)), key_labels)

    def relation(i, j):
        kind = label_rule(i, j)
        image, block = (images[i] == key_images[j],
                        blocks[i] == key_blocks[j])
        near = dict(batch=True, image=image, block=block,
                    positives_across_images=kind > 0 or image)[scope]
        return kind * bool(near) * (not alone or i != j)

    each = slow_terms(anchors.detach(), keys.detach(), relation, .3, own)
    if scope == 'block':
        tiles = {}
        for i, term in each.items():
            tiles.setdefault(blocks[i].item(), []).append(term)
        assert len({len(tile) for tile in tiles.values()}) > 1
        each = {tile: sum(terms) / len(terms)
                for tile, terms in tiles.items()}
    more = {} if alone else dict(
        keys=keys, key_labels=key_labels, key_images=key_images,
        key_blocks=key_blocks)
    got = bank.loss(anchors, labels, .3, own, images=images, blocks=blocks,
                    **more)
    assert got.item() == pytest.approx(
        sum(each.values()) / len(each), rel=1e-11)
    grad, = torch.autograd.grad(got, anchors)
    assert grad[labels == 255].eq(0).all()
    # The background is a key of others, and no anchor; unless keys are none.
    assert grad[labels == 0].ne(0).any() == alone


def test_weights_join_those_of_tiles():
    bank = build(scope='block', block_size=4)
    anchors, labels, images, blocks = draw_batch()
    a = torch.rand(24, generator=generator(1)).double()

    def loss(**weights):
        return bank.loss(anchors, labels, .3, 'energy', images=images,
                         blocks=blocks, **weights)

    tiles = ops.place_weights(labels.where(labels < 4, torch.tensor(-1)),
                              blocks, labels.where(labels < 4, torch.tensor(
                                  -1)), blocks, True, torch.float64)
    want = build().loss(
        anchors, labels, .3, 'energy').item()  # another set of pairs
    got = loss(anchor_weights=a)
    rule = ops.within(ops.same_label(labels, labels), blocks, blocks)
    torch.testing.assert_close(got, ops.pair_contrast_loss(
        anchors, anchors, rule, .3, own='energy', exclude_self=True,
        anchor_weights=a * tiles), **EXACT)
    assert got.item() != pytest.approx(want, rel=1e-3)
    # Of rank 1 as a matrix it is the same.
    torch.testing.assert_close(got, loss(
        anchor_weights=a.unsqueeze(1),
        key_weights=torch.ones(24, 1).double()), **EXACT)


@pytest.mark.parametrize('scope', ['image', 'block'])
def test_a_scope_without_a_pair_is_zero_and_connected(scope):
    bank = build(scope=scope, block_size=2 if scope == 'block' else None)
    anchors = unit(6, WIDTH).requires_grad_()
    places = torch.arange(6)
    for labels in (torch.zeros(6).long(), torch.full((6, ), 255)):
        loss = bank.loss(anchors, labels, .1, 'energy', images=places,
                         blocks=places)
        grad, = torch.autograd.grad(loss, anchors)
        assert loss == 0 and grad.eq(0).all()


def test_an_image_without_another_is_supervised_contrast_of_each():
    bank = build(scope='image')
    anchors, labels, images, _ = draw_batch(40)
    got = bank.loss(anchors, labels, .1, 'energy', images=images)
    each = []
    for image in range(3):
        f, y = anchors[images == image], labels[images == image]
        relation = by_label(y, y)
        each += slow_terms(f, f, lambda i, j, of=relation: (
            of(i, j) * (i != j)), .1, 'energy').values()
    assert got.item() == pytest.approx(sum(each) / len(each), rel=1e-11)


@pytest.mark.parametrize('own', ['energy', 'positive'])
def test_slices_of_the_same_height_are_no_negatives(own):
    # Chaitanya's GD-: two views of each slice; a partition is the label.
    bank = build(rule='same_pair')
    views = torch.cat([unit(6, WIDTH), unit(6, WIDTH, seed=1)])
    slices = torch.arange(6).repeat(2)
    parts = torch.tensor([0, 1, 2, 0, 1, 1]).repeat(2)
    got = bank.loss(views, parts, .1, own, images=slices)
    total = 0.
    for i in range(12):
        other = (i + 6) % 12
        s = (views @ views[i] / .1).tolist()
        minus = [s[j] for j in range(12) if parts[j] != parts[i]]
        total += logsumexp([s[other], *minus]) - s[other]
    assert got.item() == pytest.approx(total / 12, rel=1e-11)
    # GR: every slice is a partition: SimCLR.
    lone = build(rule='same_pair', num_classes=6).loss(
        views, slices, .1, own, images=slices)
    s = views @ views.T / .1
    s.fill_diagonal_(ABSENT)
    want = F.cross_entropy(s, (torch.arange(12) + 6) % 12)
    torch.testing.assert_close(lone, want, **EXACT)
    # GD: all of the partition are positives.
    pulled = build().loss(views, parts, .1, own)
    assert pulled.item() == pytest.approx(slow_loss(
        views, views, lambda i, j: (i != j) * (
            1 if parts[i] == parts[j] else -1), .1, own), rel=1e-11)


def test_relations_of_the_teacher_are_the_positives():
    bank = build(rule='teacher_topk', k=3, chunk_size=4)
    anchors, labels, *_ = draw_batch(15)
    teacher = unit(15, 7, seed=9)
    anchors.requires_grad_()
    got = bank.loss(anchors, labels, .1, 'positive', reduce_positives='lse',
                    teacher=teacher)

    def relation(i, j):
        there = [n for n in range(15) if labels[n] != 255 and n != i]
        there.sort(key=lambda n: -(teacher[i] @ teacher[n]).item())
        if labels[i] == 255 or j not in there:
            return 0
        return 1 if j in there[:3] else -1

    assert got.item() == pytest.approx(slow_loss(
        anchors.detach(), anchors.detach(), relation, .1, 'positive', 'lse'),
        rel=1e-11)
    grad, = torch.autograd.grad(got, anchors)
    assert grad[labels == 255].eq(0).all() and grad.abs().sum() > 0
    # Keys of another view, with the teacher's of the same.
    keys, key_labels, *_ = draw_batch(8, 4)
    taught = unit(8, 7, seed=2)
    got = bank.loss(anchors, labels, .1, 'positive', teacher=teacher,
                    keys=keys, key_labels=key_labels, key_teacher=taught)
    rule = ops.teacher_topk(teacher, taught, 3, labels, key_labels)
    torch.testing.assert_close(got, ops.pair_contrast_loss(
        anchors, keys, rule, .1), **EXACT)


@pytest.mark.parametrize('change, message', [
    (dict(scope='row'), "BatchBank.scope = 'row' must be"),
    (dict(rule='near'), "BatchBank.rule = 'near' must be"),
    (dict(rule='same_pair', scope='image'), "set scope = 'batch'"),
    (dict(gather=True, scope='image'), "no pair with scope = 'image'"),
    (dict(scope='block'), r'BatchBank.block_size .* got None'),
    (dict(block_size=3), r'BatchBank.block_size .* got 3'),
    (dict(rule='teacher_topk'), r'BatchBank.k must be at least 1'),
    (dict(rule='teacher_topk', k=0), r'BatchBank.k .* got 0'),
    (dict(k=2), r'BatchBank.k .* got 2')])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize('config, name', [
    (dict(scope='image'), 'images'), (dict(rule='same_pair'), 'images'),
    (dict(scope='positives_across_images'), 'images'),
    (dict(scope='block', block_size=2), 'blocks'),
    (dict(rule='teacher_topk', k=2), 'teacher')])
def test_what_a_loss_needs_is_named(config, name):
    bank = build(**config)
    anchors, labels, *_ = draw_batch()
    with pytest.raises(ValueError, match=f'needs {name} of the anchors'):
        bank.loss(anchors, labels, .1, 'energy')
    mine = {name: labels if name != 'teacher' else anchors}
    with pytest.raises(ValueError, match=f'key_{name} if there are keys'):
        bank.loss(anchors, labels, .1, 'energy', keys=anchors,
                  key_labels=labels, **mine)


# Weights


def test_joint_probabilities_of_a_pair_weight_its_term():
    # UCD: softmax(a)_i softmax(b)_j, and 1 between two labelled pixels.
    anchors, keys = unit(7, WIDTH), unit(6, WIDTH, seed=1)
    p = torch.randn(7, 3, generator=generator(2)).double().softmax(1)
    q = torch.randn(6, 3, generator=generator(3)).double().softmax(1)
    labels, key_labels = integers(3, 7, 4), integers(3, 6, 5)
    certain, key_certain = integers(2, 7, 6) > 0, integers(2, 6, 7) > 0
    rule = ops.same_label(labels, key_labels)
    bank = build()
    for sure in (False, True):
        flags = (certain, key_certain) if sure else ()
        a, b = ops.joint_weights(p, q, *flags)
        dense = p @ q.T
        if sure:
            both = certain.unsqueeze(1) & key_certain
            assert both.any() and not both.all()
            dense = dense.masked_fill(both, 1.)
        torch.testing.assert_close(a @ b.T, dense, **EXACT)
        want = slow_loss(anchors, keys, lambda i, j: rule(
            slice(i, i + 1))[0, j].item(), .07, 'positive',
            pair_weights=dense)
        for chunk in (2, None):
            got = ops.pair_contrast_loss(
                anchors, keys, rule, .07, anchor_weights=a, key_weights=b,
                chunk_size=chunk)
            assert got.item() == pytest.approx(want, rel=1e-11)
        assert bank.loss(
            anchors, labels, .07, 'positive', anchor_weights=a, keys=keys,
            key_labels=key_labels, key_weights=b).item() == pytest.approx(
                want, rel=1e-11)
    assert ops.joint_weights(p, q, certain)[0] is p
    # A sum over classes of weights that are products.
    each = [ops.pair_contrast_loss(
        anchors, keys, rule, .07, anchor_weights=p[:, c],
        key_weights=q[:, c]) for c in range(3)]
    torch.testing.assert_close(sum(each), ops.pair_contrast_loss(
        anchors, keys, rule, .07, anchor_weights=p, key_weights=q), **EXACT)


def test_gradients_of_weights_of_a_rank():
    anchors, keys = unit(5, 3), unit(4, 3, seed=1)
    a = torch.rand(5, 2, generator=generator(2)).double()
    b = torch.rand(4, 2, generator=generator(3)).double()
    rule = ops.same_label(integers(2, 5), integers(2, 4))
    inputs = [one.requires_grad_() for one in (anchors, keys, a, b)]
    assert torch.autograd.gradcheck(
        lambda f, k, a, b: ops.pair_contrast_loss(
            f, k, rule, .5, anchor_weights=a, key_weights=b, chunk_size=2),
        inputs)


def test_the_complement_of_weights():
    # CLUDA: w w^T within a resolution, 1 - w w^T across.
    w, v = torch.rand(6).double(), torch.rand(5).double()
    a, b = ops.complement_weights(w, v)
    torch.testing.assert_close(a @ b.T, 1 - w.unsqueeze(1) * v, **EXACT)
    again = ops.complement_weights(a, b)
    torch.testing.assert_close(
        again[0] @ again[1].T, w.unsqueeze(1) * v, **EXACT)
    anchors, keys = unit(6, 4), unit(5, 4, seed=1)
    rule = ops.same_label(integers(2, 6), integers(2, 5))

    def loss(**weights):
        return ops.pair_contrast_loss(anchors, keys, rule, 1., **weights)

    torch.testing.assert_close(
        loss(anchor_weights=a, key_weights=b),
        loss() - loss(anchor_weights=w, key_weights=v), **EXACT)


@pytest.mark.parametrize('a, b', [
    ((6, 2), (5, )), ((6, ), (5, 2)), ((6, 2), (5, 3)), ((6, 2), None)])
def test_weights_that_do_not_fit_are_a_clear_mistake(a, b):
    a, b = (None if one is None else torch.ones(one) for one in (a, b))
    with pytest.raises(ValueError, match='matrices with as many columns'):
        ops.pair_contrast_loss(
            unit(6, 4), unit(5, 4), torch.ones(6, 5), .1, anchor_weights=a,
            key_weights=b)


# Ranks


def rank_batch(rank):
    """Anchors of a rank; some ignored, and not as many on both."""
    anchors, labels, images, _ = draw_batch(10, 20 + rank)
    labels[:3 * rank] = 255
    weights = torch.rand(10, generator=generator(rank)).double()
    return anchors, labels, images, weights


GATHERED = dict(
    batch=dict(gather=True),
    across=dict(gather=True, scope='positives_across_images'),
    pair=dict(gather=True, rule='same_pair'),
    teacher=dict(gather=True, rule='teacher_topk', k=2))


def run_rank(rank, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=(folder / 'meeting').as_uri(), rank=rank,
        world_size=2)
    result = {}
    for kind, config in GATHERED.items():
        anchors, labels, images, weights = rank_batch(rank)
        anchors.requires_grad_()
        loss = build(**config).loss(
            anchors, labels, .3, 'positive', images=images,
            anchor_weights=weights, key_weights=weights,
            teacher=anchors.detach()[:, :3])
        grad, = torch.autograd.grad(loss, anchors)
        result[kind] = loss.detach(), grad
    torch.save(result, folder / f'{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_ranks_compare_with_the_keys_of_both(tmp_path):
    # Forked, as a new process would import all of mmseg again.
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path, ), nprocs=2, join=False, daemon=True,
        start_method='fork')
    assert any(processes.join(timeout=20) for _ in range(3))
    for rank in range(2):
        result = torch.load(tmp_path / f'{rank}.pth')
        mine, other = rank_batch(rank), rank_batch(1 - rank)
        labels = torch.cat([mine[1], other[1]])
        weights = torch.cat([mine[3], other[3]])
        # Numbers of images mean something on their own rank only.
        images = torch.cat([mine[2], other[2] + 100])
        rules = dict(
            batch=ops.same_label(mine[1], labels),
            across=ops.same_label_across_images(
                mine[1], mine[2], labels, images),
            pair=ops.same_pair(mine[2], images, mine[1], labels),
            teacher=ops.teacher_topk(
                mine[0][:, :3], torch.cat([mine[0], other[0]])[:, :3], 2,
                mine[1], labels, True))
        for kind, rule in rules.items():
            anchors = mine[0].clone().requires_grad_()
            want = ops.pair_contrast_loss(
                anchors, torch.cat([anchors, other[0]]), rule, .3,
                own='positive', exclude_self=True, anchor_weights=mine[3],
                key_weights=weights)
            loss, grad = result[kind]
            torch.testing.assert_close(loss, want, **EXACT)
            torch.testing.assert_close(
                grad, *torch.autograd.grad(want, anchors), **EXACT)
            alone = build(**{**GATHERED[kind], 'gather': False}).loss(
                mine[0], mine[1], .3, 'positive', images=mine[2],
                anchor_weights=mine[3], key_weights=mine[3],
                teacher=mine[0][:, :3])
            assert abs(alone - loss) > 1e-3


# Other libraries and known mistakes of published code


@pytest.mark.parametrize('labels', [
    [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2, 2]])
def test_equal_to_pytorch_metric_learning(labels):
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    labels = torch.tensor(labels)
    anchors = unit(len(labels), WIDTH).requires_grad_()

    def compare(mine, theirs):
        torch.testing.assert_close(mine, theirs)
        for a, b in zip(torch.autograd.grad(mine, anchors),
                        torch.autograd.grad(theirs, anchors), strict=True):
            # Theirs is of vectors that it scales to length 1 once more.
            a = a - (a * anchors).sum(1, keepdim=True) * anchors
            torch.testing.assert_close(a, b)

    def ours(own, weights=None):
        return bank.loss(anchors, labels, .1, own, anchor_weights=weights)

    bank = build()
    compare(ours('energy'),
            losses.SupConLoss(temperature=.1)(anchors, labels))
    # NT-Xent is the mean over pairs, ours over anchors: the same where all
    # have as many positives.
    number = (labels.unsqueeze(1) == labels).sum(1) - 1.
    balance = (number / number.mean()).double()
    theirs = losses.NTXentLoss(temperature=.1)
    compare(ours('positive', balance), theirs(anchors, labels))
    if len(number.unique()) == 1:
        compare(ours('positive'), theirs(anchors, labels))
    else:
        assert abs(ours('positive') - theirs(anchors, labels)) > .01


def test_pixels_and_labels_have_the_same_order():
    # CLUDA flattens features pixel by pixel, labels image by image.
    maps, labels = unit(2, 12, WIDTH), integers(3, 24).view(2, 12)
    got = build().loss(
        maps.flatten(0, 1), labels.flatten(), 1., 'positive')
    flat = maps.flatten(0, 1)
    ids = labels.flatten()
    relation = by_label(ids, ids)
    want = slow_loss(flat, flat, lambda i, j: relation(i, j) * (i != j), 1.,
                     'positive')
    assert got.item() == pytest.approx(want, rel=1e-12)
    mixed = maps.transpose(0, 1).flatten(0, 1)
    published = slow_loss(
        mixed, mixed, lambda i, j: relation(i, j) * (i != j), 1., 'positive')
    assert abs(got.item() - published) > 1e-3


def test_a_class_of_one_pixel_is_no_zero_by_zero():
    # Hu: its mean over no positive is NaN.
    anchors, labels = unit(7, WIDTH), torch.tensor([0, 0, 1, 1, 1, 2, 3])
    s = anchors @ anchors.T / .07
    s.fill_diagonal_(ABSENT)
    same = (labels.unsqueeze(1) == labels) & ~torch.eye(7, dtype=torch.bool)
    logs = (s - s.logsumexp(1, keepdim=True)).where(
        same, torch.zeros(()).double())
    each = -logs.sum(1) / same.sum(1)
    foreground = labels > 0
    assert each[foreground].mean().isnan()
    anchors.requires_grad_()
    got = build(skip_classes=(0, )).loss(anchors, labels, .07, 'energy')
    torch.testing.assert_close(got, each[2:5].mean())
    got.backward()
    assert anchors.grad.isfinite().all()


def test_positives_and_negatives_are_shifted_alike():
    # UCD subtracts the largest similarity from the positives alone.
    anchors, labels = unit(8, WIDTH), integers(2, 8)
    s = anchors @ anchors.T / .07
    same = labels.unsqueeze(1) == labels
    others = (s.exp() * ~same).sum(1, keepdim=True)
    diagonal = torch.eye(8, dtype=torch.bool)
    shifted = s - s.amax(1, keepdim=True)

    def mean(logs):
        positive = same & ~diagonal
        return -((logs * positive).sum(1) / positive.sum(1)).mean()

    want = mean(s - (s.exp() + others).log())
    published = mean(shifted - (shifted.exp() + others).log())
    got = build().loss(anchors, labels, .07, 'positive')
    torch.testing.assert_close(got, want)
    assert abs(got - published) > 1


@pytest.mark.parametrize('tau', [.5, 1., 100.])
def test_a_distribution_is_above_the_mean_over_drawn_positives(tau):
    # SDCA's closed form bounds InfoNCE with keys drawn from the classes.
    anchors, mean = unit(5, WIDTH), unit(3, WIDTH, seed=1)
    variance = .2 * torch.rand(
        3, WIDTH, generator=generator(2), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    energies = ops.gaussian_energies(anchors, mean, variance, tau)
    bound = ops.contrast_loss(energies, ops.own_class(
        ops.prototype_energies(anchors, mean, tau), labels), labels).item()
    noise = torch.randn(
        3, 25000, WIDTH, generator=generator(3), dtype=torch.float64)
    # In pairs that cancel, so that the mean is exact.
    keys = mean.unsqueeze(1) + variance.sqrt().unsqueeze(1) * torch.cat(
        [noise, -noise], 1)
    filled = torch.ones(3, 50000, dtype=torch.bool)
    drawn = ops.contrast_loss(
        ops.bank_energies(anchors, keys, filled, tau, 'lse')
        - math.log(50000),
        ops.bank_positives(anchors, labels, keys, filled, tau), labels,
        'positive').item()
    assert 1e-3 < (bound - drawn) * tau**2 < .1


# The device


@pytest.mark.parametrize('config', [
    dict(scope='image', skip_classes=(0, )),
    dict(scope='block', block_size=2), dict(rule='same_pair'),
    dict(scope='positives_across_images'), dict(rule='teacher_topk', k=2)])
def test_nothing_asks_for_a_value(config, monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    anchors, labels, images, blocks = (
        one.to('meta') for one in draw_batch())
    anchors.requires_grad_()
    mixing = MODELS.build(dict(type='HardNegativeMixing', hardest=3))
    build(**config).to('meta').loss(
        anchors, labels, .1, 'positive', .07, 'mean',
        torch.ones(24, 2, device='meta'), images, blocks, mixing,
        mixing.draw(24, generator(0), 'meta'), anchors.detach(),
        key_weights=torch.ones(24, 2, device='meta')).backward()
    assert anchors.grad.shape == (24, WIDTH)
