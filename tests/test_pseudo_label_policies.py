"""Policies against slow loops, their state, and labels that files hold."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS

from datasets_common import CLASSES as NAMES
from datasets_common import files_pipeline, folder, write_folder
from helpers import CLASSES, batch, build, dacs_parts, run, total
from mmseg_contrast import ops
from mmseg_contrast.adaptation import (
    ClassThresholds,
    ConfidentPixels,
    PrototypeRectified,
    PrototypeState,
    StoredPseudoLabels,
    View,
)
from mmseg_contrast.datasets import LoadPseudoLabels
from mmseg_contrast.datasets.pseudo_label_files import (
    MANIFEST,
    decode_soft,
    encode_hard,
    encode_soft,
    label_file,
)

SIZE = (12, 10)


def draw(seed=0, samples=2, classes=CLASSES, size=SIZE, sharp=2.):
    """Logits of a batch."""
    gen = torch.Generator().manual_seed(seed)
    return sharp * torch.randn(samples, classes, *size, generator=gen)


class FakeStep:
    """One view, one teacher, one student."""

    def __init__(self, logits, valid=None, features=None, extras=None,
                 **state):
        self.logits, self.features = logits, features
        self.states = state
        samples, size = len(logits), logits.shape[-2:]
        self.one = View('target', torch.zeros(samples, 3, *size), 'target',
                        valid=valid, extras=extras or {})
        self.logs = {}

    def view(self, name):
        return self.one

    def teacher(self, name, view):
        return self.logits.softmax(1)

    def teacher_pass(self, name, view):
        return SimpleNamespace(logits=self.logits, image_logits=self.logits,
                               decoder_features=self.features)

    def log(self, key, value):
        self.logs[key] = value


def check_weights(pseudo, step):
    """What mmseg's losses get in either form."""
    (scale, mask), = pseudo.parts
    assert torch.equal(scale * mask, pseudo.weights)
    assert pseudo.weights.dtype == torch.float32
    share = pseudo.weights.mean()
    assert step.logs['name.confident_ratio'] == share
    assert step.logs['name.pseudo_weight'] == share


# Confident pixels


def test_confident_pixels_count_and_others_do_not():
    logits = draw()
    valid = torch.ones(2, *SIZE, dtype=torch.bool)
    valid[:, :3] = False
    step = FakeStep(logits, valid)
    pseudo = ConfidentPixels(threshold=.6)(step, 'name')
    probs = logits.softmax(1)
    assert torch.equal(pseudo.labels, probs.argmax(1))
    assert torch.equal(pseudo.confidence, probs.amax(1))
    counted = 0
    for n in range(2):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                want = y >= 3 and probs[n, :, y, x].max() >= .6
                assert pseudo.weights[n, y, x] == float(want)
                counted += want
    assert 0 < counted < valid.sum()
    check_weights(pseudo, step)


def test_a_logit_is_a_weaker_filter_than_a_probability():
    logits = draw()
    pseudo = ConfidentPixels(threshold=.9, on='logit')(
        FakeStep(logits), 'name')
    assert torch.equal(pseudo.weights, (logits.amax(1) >= .9).float())
    torch.testing.assert_close(pseudo.confidence, logits.softmax(1).amax(1))
    strict = ConfidentPixels(threshold=.9)(FakeStep(logits), 'name')
    assert pseudo.weights.sum() > 2 * strict.weights.sum() > 0
    with pytest.raises(ValueError, match="on = 'logit' needs a logit"):
        ConfidentPixels(on='logit')(FakeStep(logits[:, :1]), 'name')


@pytest.mark.parametrize('policy', [
    dict(type='ConfidentPixels', threshold=.3),
    dict(type='ConfidentPixels', threshold=0., on='logit'),
    dict(type='ClassThresholds', rule='cbst')])
def test_the_student_labels_for_itself_without_a_gradient(policy):
    parts = dacs_parts(
        pseudo_labels=dict(target=dict(policy, teacher='student')),
        views=dict(own=dict(type='PseudoLabelled')),
        objectives=dict(own=dict(type='Segmentation', view='own')),
        teachers={})
    model = build(**parts)
    model.keep_step = True
    losses = run(model, batch())
    step = model.last_step
    pseudo = step.pseudo_labels['target']
    logits = F.interpolate(step.student('target').logits, (32, 32),
                           mode='bilinear').detach()
    confidence, labels = logits.softmax(1).max(1)
    assert not pseudo.confidence.requires_grad
    reader = model.pseudo_labels['target'].predictor
    assert not reader.probabilities(step).requires_grad
    # Others learn from the same pass.
    assert step.students['target'].logits.requires_grad
    assert pseudo.weights.sum() > 0
    if policy.get('rule') != 'cbst':
        assert torch.equal(pseudo.labels, labels)
        torch.testing.assert_close(pseudo.confidence, confidence)
    total(losses).backward()
    # The pass is shared: one of the view, not another one for its labels.
    assert set(step.students) == {'target', 'own'}


@pytest.mark.parametrize('config, text', [
    (dict(type='ConfidentPixels', threshold=1.5), r'threshold must lie in'),
    (dict(type='ConfidentPixels', on='sigmoid'), "on must be one of 'prob"),
    (dict(type='ConfidentPixels', teacher='none'), 'is not in model.teach'),
    (dict(type='ClassThresholds', rule='median'), "rule must be one of 'cbs"),
    (dict(type='ClassThresholds', portion=0.), r'portion must lie in \(0'),
    (dict(type='ClassThresholds', momentum=1.), r'momentum must lie in'),
    (dict(type='ClassThresholds', bins=1000), 'bins must be a power of two'),
    (dict(type='ClassThresholds', thresholds=[.5]), 'each of the 5 classes'),
    (dict(type='StoredPseudoLabels', min_share=2.), 'min_share must lie in'),
    (dict(type='PrototypeRectified', soft='own'), "soft must be one of 'te"),
    (dict(type='PrototypeRectified', temperature=0.), 'must be positive'),
])
def test_a_mistake_names_its_key(config, text):
    with pytest.raises(ValueError, match=text) as caught:
        build(**dacs_parts(pseudo_labels=dict(target=config)))
    assert 'model.pseudo_labels.target' in str(caught.value)


# Thresholds by class


def sorted_thresholds(confidence, labels, portion, ceiling):
    """The quantile of each class, from all its pixels."""
    found = []
    for c in range(CLASSES):
        own = sorted(confidence[labels == c].tolist(), reverse=True)
        if not own:
            found.append(ceiling)
            continue
        kept = int(np.ceil(portion * len(own)))
        found.append(min(own[kept - 1], ceiling))
    return torch.tensor(found)


@pytest.mark.parametrize('portion', [.2, .5, .83, 1.])
@pytest.mark.parametrize('ceiling', [.5, 1.])
def test_thresholds_are_the_quantiles(portion, ceiling):
    probs = draw(3, size=(40, 30)).softmax(1)
    confidence, labels = ops.hard_labels(probs)
    labels[labels == 2] = 255
    counts = ops.confidence_histogram(confidence, labels, CLASSES, 1 << 14)
    got = ops.class_thresholds(counts, portion, ceiling)
    want = sorted_thresholds(confidence, labels, portion, ceiling)
    assert got[2] == ceiling
    exact = got == ceiling  # what the ceiling cuts is not rounded
    assert torch.equal(exact, want >= ceiling)
    assert ((want - got) >= 0)[~exact].all()
    assert ((want - got) < 1 / (1 << 14))[~exact].all()
    # SPCL's published index is that of the median.
    if portion == .5 and ceiling == 1.:
        for c in (0, 1, 3, 4):
            own = np.sort(confidence[labels == c].numpy())
            published = own[int(np.round(len(own) * .5))]
            neighbour = own[int(np.round(len(own) * .5)) - 1]
            assert neighbour - 1e-4 <= got[c] <= published


def test_an_edge_is_reached_by_what_it_was_made_of():
    confidence = torch.tensor([.25, .5, .5, .75, 1.])
    labels = torch.zeros(5, dtype=torch.int64)
    counts = ops.confidence_histogram(confidence, labels, 2, 8)
    assert counts[0].tolist() == [0, 0, 1, 0, 2, 0, 1, 1]
    assert counts[1].sum() == 0
    for portion, edge in ((.2, .875), (.4, .75), (.6, .5), (.8, .5),
                          (1., .25)):
        got = ops.class_thresholds(counts, portion, 1.)
        assert got.tolist() == [edge, 1.]
        assert (confidence >= got[0]).float().mean() >= portion
    valid = torch.tensor([True, False, True, True, False])
    half = ops.confidence_histogram(confidence, labels, 2, 8, valid)
    assert half[0].tolist() == [0, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize('ratio', [False, True])
def test_labels_over_thresholds(ratio):
    probs = draw(1).softmax(1)
    thresholds = torch.tensor([.9, .5, .2, .7, .05])
    labels, confidence, sure = ops.over_thresholds(probs, thresholds, ratio)
    for n in range(2):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                p = probs[n, :, y, x]
                score = p / thresholds if ratio else p
                c = int(score.argmax())
                assert labels[n, y, x] == c
                assert confidence[n, y, x] == p[c]
                assert sure[n, y, x] == (p[c] >= thresholds[c])
    assert 0 < sure.float().mean() < 1
    # The ratio gives rare classes more pixels.
    assert ratio == (not torch.equal(labels, probs.argmax(1)))


@pytest.mark.parametrize('rule, portion, ceiling', [
    ('cbst', .2, 1.), ('spcl', .5, .9)])
def test_class_thresholds_of_one_batch(rule, portion, ceiling):
    logits = draw(2, size=(40, 30), sharp=3.)
    policy = ClassThresholds(CLASSES, rule=rule)
    step = FakeStep(logits)
    pseudo = policy(step, 'name')
    probs = logits.softmax(1)
    confidence, labels = ops.hard_labels(probs)
    want = sorted_thresholds(confidence, labels, portion, ceiling)
    torch.testing.assert_close(policy.thresholds(), want, rtol=0,
                               atol=1 / 4096)
    # At least the portion of each class's pixels is kept, and no bin more.
    for c in range(CLASSES):
        mine = labels == c
        kept = pseudo.weights[mine].sum() / mine.sum()
        assert kept >= min(portion, 1.)
        if rule == 'spcl' and want[c] < ceiling:
            assert kept < portion + .02
    labels, _, sure = ops.over_thresholds(
        probs, policy.thresholds(), rule == 'cbst')
    assert torch.equal(pseudo.labels, labels)
    assert torch.equal(pseudo.weights, sure.float())
    check_weights(pseudo, step)
    fixed = ClassThresholds(CLASSES, rule=rule,
                            thresholds=policy.thresholds().tolist())
    again = fixed(FakeStep(logits), 'name')
    assert torch.equal(again.weights, pseudo.weights)
    assert not fixed.state_dict()


def test_what_was_before_fades_and_an_absent_class_is_kept():
    policy = ClassThresholds(CLASSES, momentum=.75, bins=64)
    first, second = draw(4), draw(5)
    second[:, 2] = -50.
    valid = torch.rand(2, *SIZE, generator=torch.Generator()) > .3
    counts = []
    for logits in (first, second):
        confidence, labels = ops.hard_labels(logits.softmax(1))
        labels = labels.masked_fill(~valid, 255)
        counts.append(ops.confidence_histogram(
            confidence, labels, CLASSES, 64).float())
    policy(FakeStep(first, valid), 'name')
    assert torch.equal(policy.histogram, counts[0])
    policy(FakeStep(second, valid), 'name')
    assert torch.equal(policy.histogram[2], counts[0][2])
    others = [0, 1, 3, 4]
    torch.testing.assert_close(
        policy.histogram[others], (.75 * counts[0] + counts[1])[others])


def test_class_thresholds_resume():
    parts = dacs_parts(pseudo_labels=dict(target=dict(
        type='ClassThresholds', rule='spcl')))
    model = build(**parts)
    for seed in range(2):
        run(model, batch(seed=seed))
    state = copy.deepcopy(model.state_dict())
    assert state['pseudo_labels.target.histogram'].sum() > 0
    other = build(seed=1, **parts)
    other.load_state_dict(state)
    model.keep_step = other.keep_step = True
    for one in (model, other):
        run(one, batch(seed=2))
    first, second = (one.last_step.pseudo_labels['target']
                     for one in (model, other))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(*(one.pseudo_labels['target'].histogram
                         for one in (model, other)))


# Prototypes


def test_class_means_of_images():
    features = torch.randn(3, 4, *SIZE,
                           generator=torch.Generator().manual_seed(0))
    labels = draw(6, samples=3).argmax(1)
    labels[0, :2] = 255
    labels[1][labels[1] == 3] = 0
    least = int((labels[2] == 1).sum()) + 1
    means, exists = ops.image_class_means(features, labels, CLASSES, least)
    for c in range(CLASSES):
        for n in range(3):
            own = features[n][:, labels[n] == c]
            assert exists[c, n] == (own.shape[1] >= least)
            want = own.mean(1) if exists[c, n] else torch.zeros(4)
            torch.testing.assert_close(means[c, n], want)
    assert not exists[3, 1] and not exists[1, 2] and exists.sum() > 5


@pytest.mark.parametrize('momentum', [.3, 1.])
@pytest.mark.parametrize('mean_until', [0, 1, 4])
def test_prototypes_move_as_one_vector_after_the_other(momentum, mean_until):
    gen = torch.Generator().manual_seed(0)
    got = torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64)
    want, number = got[0].clone(), [0, 0, 0]
    for _ in range(3):
        new = torch.randn(3, 5, 4, generator=gen).double()
        exists = torch.rand(3, 5, generator=gen) > .4
        exists[1] = number[1] == 0 and exists[1]  # absent later
        before = got[0][1].clone()
        got = ops.moved_prototypes(*got, new, exists, momentum, mean_until)
        for c in range(3):
            for k in range(5):
                if not exists[c, k]:
                    continue
                if number[c] < max(mean_until, 1):
                    share = 1 / (number[c] + 1)
                else:
                    share = momentum
                want[c] = (1 - share) * want[c] + share * new[c, k]
                number[c] += 1
        torch.testing.assert_close(got[0], want)
        assert got[1].tolist() == number
        if not exists[1].any():
            assert torch.equal(got[0][1], before)
    assert min(number) > 0


def test_scores_are_softmax_of_distances():
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 3, 2, generator=gen)
    prototypes = torch.randn(CLASSES, 4, generator=gen)
    exists = torch.tensor([True, True, False, True, True])
    got = ops.prototype_scores(features, prototypes, exists, 1.5).exp()
    for n in range(2):
        for y in range(3):
            for x in range(2):
                near = torch.stack([
                    (-1.5 * (features[n, :, y, x] - one).norm()).exp()
                    for one in prototypes]) * exists
                torch.testing.assert_close(
                    got[n, :, y, x], near / near.sum())
    none = ops.prototype_scores(
        features, torch.zeros_like(prototypes), exists & False, 1.)
    torch.testing.assert_close(none.exp(), torch.full_like(none, 1 / CLASSES))


def test_consistency_without_a_prototype_is_finite():
    gen = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 3, 2, generator=gen, requires_grad=True)
    teacher = torch.randn(2, 4, 3, 2, generator=gen)
    prototypes = torch.randn(CLASSES, 4, generator=gen)
    prototypes[0] = student[0, :, 0, 0].detach()  # a distance of 0
    for exists in (torch.tensor([True, True, False, True, True]),
                   torch.zeros(CLASSES, dtype=torch.bool)):
        s, t = (ops.prototype_scores(one, prototypes, exists, 1.)
                for one in (student, teacher))
        loss = ops.prototype_consistency(s, t)
        grad, = torch.autograd.grad(loss, student)
        assert loss.isfinite() and grad.isfinite().all()
        some = exists if exists.any() else ~exists
        want = (t.exp() * (t - s))[:, some].sum() / t.numel()
        torch.testing.assert_close(loss, want)


def state_of(features, **options):
    options = dict(dict(num_classes=CLASSES, channels=features.shape[1]),
                   **options)
    return PrototypeState(**options)


def test_labels_are_rectified_at_the_resolution_of_the_labels():
    logits = draw(7, sharp=1.)
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 6, 5, generator=gen)
    state = state_of(features)
    step = FakeStep(logits, features=features, prototypes=state)
    policy = PrototypeRectified(temperature=2., threshold=.5)
    probs = logits.softmax(1)
    # Nothing changes as long as there is no prototype.
    torch.testing.assert_close(policy(step, 'name').probs, probs)
    state.mean.copy_(torch.randn(CLASSES, 4, generator=gen))
    state.count.fill_(3)
    state.count[4] = 0
    pseudo = policy(step, 'name')
    weights = ops.prototype_scores(features, state.mean, state.exists,
                                   2.).exp()
    weights = F.interpolate(weights, SIZE, mode='bilinear')
    want = probs * weights
    want = want / want.sum(1, keepdim=True)
    torch.testing.assert_close(pseudo.probs, want)
    assert torch.equal(pseudo.labels, want.argmax(1))
    assert not (pseudo.labels == 4).any()
    assert (pseudo.labels != probs.argmax(1)).any()
    assert torch.equal(pseudo.weights, (pseudo.probs.amax(1) >= .5).float())
    check_weights(pseudo, step)
    # Stored soft labels instead; where there are none, none counts.
    stored = draw(8).softmax(1)
    stored[0, :, 0] = 0
    step.one.extras['pseudo_probs'] = stored
    other = PrototypeRectified(soft='stored', temperature=2.)(step, 'name')
    assert other.weights[0, 0].eq(0).all() and other.weights.mean() > .9
    want = stored * weights
    torch.testing.assert_close(
        other.probs[1], (want / want.sum(1, keepdim=True))[1])
    del step.one.extras['pseudo_probs']
    with pytest.raises(ValueError, match='no soft labels: set train_data'):
        PrototypeRectified(soft='stored')(step, 'name')
    with pytest.raises(ValueError, match="'others' is no PrototypeState"):
        PrototypeRectified(state='others')(step, 'name')


def test_a_whole_iteration_of_proda():
    parts = dacs_parts(
        pseudo_labels=dict(target=dict(type='PrototypeRectified')),
        views=dict(target_strong=dict(type='StrongAugment', view='target')),
        state=dict(prototypes=dict(
            type='PrototypeState', channels=8, min_pixels=2)),
        objectives=dict(
            source=dict(type='Segmentation', view='source'),
            denoised=dict(type='SymmetricCrossEntropy',
                          view='target_strong'),
            near=dict(type='PrototypeConsistency')))
    model = build(**parts)
    state = model.state['prototypes']
    with torch.no_grad():  # predict more than one class
        model.segmentor.decode_head.conv_seg.weight.normal_()
    for seed in range(3):
        model.zero_grad()
        losses = run(model, batch(seed=seed))
        assert {'denoised.loss_symmetric', 'denoised.loss_regular',
                'near.loss_consistency'} <= set(losses)
        assert total(losses).isfinite()
        total(losses).backward()
        assert all(p.grad.isfinite().all()
                   for p in model.segmentor.parameters()
                   if p.grad is not None)
        # Images of this step with enough pixels of some class.
        assert state.count.sum() > 2 * seed
    assert losses['near.loss_consistency'] > 0
    assert state.exists.sum() > 1
    saved = model.state_dict()
    other = build(seed=1, **parts)
    other.load_state_dict(saved)
    assert torch.equal(other.state['prototypes'].mean, state.mean)
    assert torch.equal(other.state['prototypes'].count, state.count)
    parts['state']['prototypes']['channels'] = 7
    with pytest.raises(ValueError, match='channels of that run'):
        build(**parts).load_state_dict(saved)
    with pytest.raises(ValueError, match='classifies 8 channels'):
        run(build(**parts), batch())


@pytest.mark.parametrize('config, text', [
    (dict(momentum=0.), r'momentum must lie in \(0, 1\]'),
    (dict(min_pixels=0), 'min_pixels must be at least 1'),
    (dict(mean_until=-1), 'mean_until must be at least 0')])
def test_a_mistake_in_the_state_names_its_key(config, text):
    parts = dacs_parts(state=dict(prototypes=dict(
        dict(type='PrototypeState', channels=8), **config)))
    with pytest.raises(ValueError, match='model.state.prototypes.' + text):
        build(**parts)


# All policies


POLICIES = dict(
    pixels=dict(type='ConfidentPixels', threshold=.3),
    cbst=dict(type='ClassThresholds', rule='cbst'),
    spcl=dict(type='ClassThresholds', rule='spcl'),
    prototypes=dict(type='PrototypeRectified', threshold=.3))


@pytest.mark.parametrize('name', POLICIES)
def test_a_mix_takes_every_policy(name):
    parts = dacs_parts(
        pseudo_labels=dict(target=POLICIES[name]),
        state=dict(prototypes=dict(type='PrototypeState', channels=8)))
    model = build(**parts)
    model.keep_step = True
    losses = run(model, batch())
    total(losses).backward()
    mixed = model.last_step.view('mixed')
    pseudo = model.last_step.pseudo_labels['target']
    assert torch.equal(
        mixed.weights, torch.where(mixed.extras['origin'],
                                   torch.ones(()), pseudo.weights))
    dense = sum(scale * mask for scale, mask in mixed.weight_parts)
    assert torch.equal(dense, mixed.weights)
    assert 0 < pseudo.weights.mean() < 1
    assert losses['target.confident_ratio'] == pseudo.weights.mean()


def test_no_value_is_asked_for(monkeypatch):
    # Meta tensors have none: whatever would wait for a GPU is an error.
    # autocast doesn't know them.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    logits = draw().to('meta')
    features = torch.randn(2, 4, 6, 5, device='meta')
    state = state_of(features).to('meta')
    extras = dict(pseudo_label=torch.zeros(
        2, *SIZE, dtype=torch.int64, device='meta'))
    valid = torch.ones(2, *SIZE, dtype=torch.bool, device='meta')
    step = FakeStep(logits, valid, features, extras, prototypes=state)
    step.one.images = step.one.images.to('meta')
    for policy in (ConfidentPixels(), ConfidentPixels(on='logit'),
                   ClassThresholds(CLASSES), PrototypeRectified(),
                   ClassThresholds(CLASSES, rule='cbst'),
                   StoredPseudoLabels(CLASSES, min_share=.1)):
        pseudo = policy.to('meta')(step, 'name')
        assert pseudo.weights.shape == (2, *SIZE)
    step.teacher_pass = lambda *_: SimpleNamespace(
        logits=logits, image_logits=logits,
        decoder_features=features)
    state.update(step)
    ops.symmetric_cross_entropy(logits, extras['pseudo_label'])


# Two ranks


def parts_of(seed):
    """A batch of four images, and what each of two ranks has of it."""
    logits = draw(seed, samples=4)
    logits[:2, seed % CLASSES] = -50.  # absent on one rank
    features = torch.randn(4, 6, *SIZE,
                           generator=torch.Generator().manual_seed(seed))
    both = logits, features
    return both, [tuple(one[2 * rank:2 * rank + 2] for one in both)
                  for rank in range(2)]


def states():
    return (ClassThresholds(CLASSES, momentum=.5, bins=64),
            PrototypeState(CLASSES, 6, momentum=.2, mean_until=3))


def see(policy, prototypes, logits, features):
    policy(FakeStep(logits), 'name')
    prototypes.update(FakeStep(logits, features=features))


def run_rank(rank, place):
    torch.distributed.init_process_group(
        'gloo', init_method=(place / 'meeting').as_uri(), rank=rank,
        world_size=2)
    pair = states()
    for seed in range(4):
        see(*pair, *parts_of(seed)[1][rank])
    torch.save([dict(one.state_dict()) for one in pair],
               place / f'{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_state_of_one(tmp_path):
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path, ), nprocs=2, join=False, daemon=True,
        start_method='fork')
    assert any(processes.join(timeout=20) for _ in range(3))
    first, second = (torch.load(tmp_path / f'{rank}.pth')
                     for rank in range(2))
    alone = states()
    for seed in range(4):
        see(*alone, *parts_of(seed)[0])
    for one, other, single in zip(first, second, alone, strict=True):
        for key, value in single.state_dict().items():
            assert torch.equal(one[key], other[key]), key
            torch.testing.assert_close(one[key], value)
            assert value.sum() != 0


# Labels from files


def stored_view(**extras):
    return FakeStep(torch.zeros(2, CLASSES, *SIZE), extras=extras)


def test_stored_labels():
    labels = draw(9).argmax(1)
    labels[0, :6] = 255
    labels[1, :3] = 255
    step = stored_view(pseudo_label=labels)
    pseudo = StoredPseudoLabels(CLASSES)(step, 'name')
    assert torch.equal(pseudo.labels, labels)
    assert torch.equal(pseudo.weights, (labels != 255).float())
    assert torch.equal(pseudo.confidence, pseudo.weights)
    check_weights(pseudo, step)
    # The first image is labelled by half.
    pseudo = StoredPseudoLabels(CLASSES, min_share=.6)(step, 'name')
    assert pseudo.weights[0].eq(0).all()
    assert torch.equal(pseudo.weights[1], (labels[1] != 255).float())
    step.one.valid = torch.zeros(2, *SIZE, dtype=torch.bool)
    assert StoredPseudoLabels(CLASSES)(step, 'name').weights.eq(0).all()
    with pytest.raises(ValueError, match=(
            'set train_dataloader.dataset.streams.target.pseudo_labels')):
        StoredPseudoLabels(CLASSES)(stored_view(), 'name')


def test_stored_soft_labels():
    probs = draw(9).softmax(1)
    probs[0, :, :2] = 0
    pseudo = StoredPseudoLabels(CLASSES, threshold=.5)(
        stored_view(pseudo_probs=probs), 'name')
    assert torch.equal(pseudo.probs, probs)
    assert pseudo.labels[0, :2].eq(255).all()
    assert torch.equal(pseudo.labels[1], probs[1].argmax(0))
    assert torch.equal(pseudo.weights, (probs.amax(1) >= .5).float())
    with pytest.raises(ValueError, match='soft labels of 5 classes'):
        StoredPseudoLabels(CLASSES + 1)(
            stored_view(pseudo_probs=probs), 'name')


def test_names_of_label_files():
    def name(path, root='/data/images'):
        return label_file('out', path, root, 'hard')

    assert name('/data/images/a/b_leftImg8bit.jpg') == (
        'out/a/b_leftImg8bit.png')
    assert name('/other/a/b.png') == 'out/b.png'
    assert name('a/b.png', '') == 'out/a/b.png'
    assert name('synthetic://target/train/000001', '') == (
        'out/target/train/000001.png')
    assert label_file('out', 's3://x/images/a.png', 's3://x/images',
                      'soft') == 'out/a.npz'


@pytest.mark.parametrize('stride, size', [(1, (7, 9)), (4, (12, 16)),
                                          (4, (7, 9))])
def test_soft_files(stride, size):
    probs = draw(2, samples=1, size=size)[0].softmax(0)
    got = decode_soft(encode_soft(probs, stride))
    assert got.dtype == np.uint8 and got.shape == (*size, CLASSES)
    got = torch.from_numpy(got).permute(2, 0, 1) / 255
    if stride == 1:
        assert (got - probs).abs().max() <= 1 / 510 + 1e-6
        return
    small = F.interpolate(probs[None], [-(-side // 4) for side in size],
                          mode='area')
    want = F.interpolate(small, size, mode='bilinear')[0]
    # One rounding in the file, one of cv2's.
    assert (got - want).abs().max() < 2 / 255


# Streams that read them


def marked(place, kind='hard', count=3, manifest=True, **options):
    """Images and pseudo-labels that are functions of their pixels."""
    root = write_folder(place / 'data', count)
    out = place / 'labels'
    out.mkdir()
    for path in sorted((root / 'img_dir').iterdir()):
        labels = (cv2.imread(str(path))[..., 1] % 3).astype(np.uint8)
        if kind == 'hard':
            labels[:, :4] = 255
            data = encode_hard(labels)
        else:
            probs = np.eye(3, dtype=np.float32)[labels] * .5 + .5 / 3
            data = encode_soft(torch.from_numpy(probs).permute(2, 0, 1), 1)
        (out / (path.stem + ('.png' if kind == 'hard' else '.npz'))
         ).write_bytes(data)
    if manifest:
        write_manifest(out, kind=kind, **options)
    return root, out


def write_manifest(out, **options):
    (out / MANIFEST).write_text(json.dumps(dict(
        dict(kind='hard', complete=True, classes=list(NAMES)), **options)))


def stream(root, out, *steps, pack='PackStreamInputs', cache=False,
           labelled=False, labels=True, **options):
    """A target whose pipeline would read ground truth if it may."""
    data = folder(root, files_pipeline(*steps, labels=labels, pack=pack),
                  serialize_data=False, **options)
    return DATASETS.build(dict(type='StreamDataset', streams=dict(
        target=dict(dataset=data, labelled=labelled, cache=cache,
                    pseudo_labels=str(out)))))


STEPS = (dict(type='RandomFlip', prob=.5),
         dict(type='RandomCrop', crop_size=(16, 24)),
         dict(type='Pad', size=(26, 18), pad_val=0))  # width, height


@pytest.mark.parametrize('kind', ['hard', 'soft'])
@pytest.mark.parametrize('cache', [False, True])
def test_stored_labels_travel_with_the_image(tmp_path, monkeypatch, kind,
                                             cache):
    # The ground truth of the target is not even there.
    root, out = marked(tmp_path, kind)
    for path in (root / 'ann_dir').iterdir():
        path.unlink()
    monkeypatch.setattr(LoadAnnotations, 'transform', None)
    dataset = stream(root, out, *STEPS, cache=cache)
    # Read once where loaded images are kept.
    reader, = dataset.streams['target'].readers
    assert isinstance(reader.loading[-1], LoadPseudoLabels)
    seen = set()
    for position in range(6):
        item = dataset[position]
        image = item['inputs']['target']
        sample = item['data_samples']['target']
        assert 'gt_sem_seg' not in sample and sample.flip in (True, False)
        seen.add(sample.flip)
        inside = image[1, :16, :24].long() % 3
        if kind == 'hard':
            labels = sample.pseudo_label.data[0]
            assert labels.dtype == torch.uint8
            assert labels.shape == (18, 26)
            kept = labels[:16, :24].long()
            there = kept != 255
            assert torch.equal(kept[there], inside[there])
            assert .8 < there.float().mean() <= 1
            assert (labels[16:] == 255).all() and (
                labels[:, 24:] == 255).all()
        else:
            probs = sample.pseudo_probs.data
            assert probs.shape == (3, 18, 26)
            assert torch.equal(probs[:, :16, :24].argmax(0), inside)
            assert (probs[:, 16:] == 0).all()
    assert seen == {True, False}


def test_stored_labels_are_resized_by_the_nearest(tmp_path):
    for kind in ('hard', 'soft'):
        root, out = marked(tmp_path / kind, kind)
        dataset = stream(root, out, dict(
            type='Resize', scale=(64, 48), keep_ratio=True))
        sample = dataset[0]['data_samples']['target']
        image = cv2.imread(sample.img_path)[..., 1] % 3
        want = torch.from_numpy(image.astype(int)).repeat_interleave(
            2, 0).repeat_interleave(2, 1)
        if kind == 'hard':
            got = sample.pseudo_label.data[0].long()
            there = got != 255
            assert torch.equal(got[there], want[there])
        else:
            assert torch.equal(sample.pseudo_probs.data.argmax(0), want)


def test_a_labelled_stream_keeps_both_apart(tmp_path):
    root, out = marked(tmp_path)
    sample = stream(root, out, labelled=True)[1]['data_samples']['target']
    truth = cv2.imread(str(sample.img_path).replace('img_dir', 'ann_dir'),
                       cv2.IMREAD_UNCHANGED)
    assert torch.equal(sample.gt_sem_seg.data[0].long(),
                       torch.from_numpy(truth.astype(int)))
    assert not torch.equal(sample.pseudo_label.data[0].long(),
                           sample.gt_sem_seg.data[0].long())


def test_folders_of_several_datasets(tmp_path):
    roots, configs = [], []
    (tmp_path / 'labels').mkdir()
    for number in range(2):
        root, out = marked(tmp_path / str(number), manifest=False)
        out.rename(tmp_path / 'labels' / str(number))
        roots.append(root)
        configs.append(folder(root, files_pipeline(pack='PackStreamInputs')))
    (tmp_path / 'labels' / '1' / '000.png').write_bytes(
        encode_hard(np.full((24, 32), 2, np.uint8)))
    write_manifest(tmp_path / 'labels')
    dataset = DATASETS.build(dict(type='StreamDataset', streams=dict(
        target=dict(datasets=configs, labelled=False,
                    pseudo_labels=str(tmp_path / 'labels')))))
    found = {}
    for position in range(6):
        sample = dataset[position]['data_samples']['target']
        found[sample.img_path] = sample.pseudo_label.data
    assert len(found) == 6
    assert (found[str(roots[1] / 'img_dir' / '000.png')] == 2).all()
    assert not (found[str(roots[0] / 'img_dir' / '000.png')] == 2).all()


def test_mistakes_are_told_before_training(tmp_path):
    root, out = marked(tmp_path)

    def refuse(text, place=out, **options):
        with pytest.raises(ValueError, match=text) as caught:
            stream(root, place, **options)
        assert '\n' not in str(caught.value)

    refuse('labels-none does not exist', tmp_path / 'labels-none')
    refuse('a field that PackSegInputs does not pack', pack='PackSegInputs')
    write_manifest(out, complete=False)
    refuse('is not complete; run tools/generate_pseudo_labels.py again')
    write_manifest(out, classes=['a', 'b', 'c'])
    refuse(r"labels of the classes \['a', 'b', 'c'\], but the stream has")
    write_manifest(out, kind='other')
    refuse('does not say kind = hard or soft')
    (out / MANIFEST).write_text('{')
    refuse('is no JSON')
    write_manifest(out)
    stream(root, out)
    (out / '001.png').unlink()
    refuse(r'1 of 3 images have no pseudo-label, .* is .*labels/001\.png')
    whole = (out / '000.png').read_bytes()
    for data, text in (
            (whole[:-20], r'labels/000\.png is broken: it is no whole PNG'),
            (encode_hard(np.zeros((24, 31), np.uint8)),
             'is 31 x 24 pixels, but its image is 32 x 24'),
            (encode_hard(np.full((24, 32), 3, np.uint8)),
             'holds the id 3, but the run has 3 classes'),
            (encode_hard(np.zeros((24, 32, 3), np.uint8)),
             'one uint8 id per pixel')):
        (out / '000.png').write_bytes(data)
        (out / '001.png').write_bytes(whole)
        refuse(text)


def test_a_model_learns_from_files(tmp_path):
    root, out = marked(tmp_path, manifest=False)
    steps = (dict(type='RandomCrop', crop_size=(24, 30)), )
    dataset = DATASETS.build(dict(type='StreamDataset', streams={
        name: dict(
            dataset=folder(root, files_pipeline(
                *steps, pack='PackStreamInputs')),
            labelled=labelled, **more)
        for name, labelled, more in (
            ('source', True, {}),
            ('target', False, dict(pseudo_labels=str(out))))}))
    model = build(**dacs_parts(
        pseudo_labels=dict(target=dict(type='StoredPseudoLabels')),
        views=dict(own=dict(type='PseudoLabelled')),
        objectives=dict(own=dict(type='Segmentation', view='own')),
        teachers={}))
    model.keep_step = True
    data = pseudo_collate([dataset[0], dataset[1]])
    losses = run(model, data)
    total(losses).backward()
    step = model.last_step
    # The preprocessor pads to 32 x 32, where no label is.
    stored = step.view('target').extras['pseudo_label']
    assert step.view('target').labels is None
    assert stored.shape == (2, 32, 32) and stored.dtype == torch.int64
    assert stored[:, 24:].eq(255).all() and stored[..., 30:].eq(255).all()
    for n, sample in enumerate(data['data_samples']['target']):
        assert torch.equal(stored[n, :24, :30],
                           sample.pseudo_label.data[0].long())
    own = step.view('own')
    assert torch.equal(own.labels, stored)
    assert torch.equal(own.weights, (stored != 255).float())
