"""Banks at any size, with updates of which parts are no numbers.

What must hold: a bank's state stays finite, whatever it is given; what is no
number changes nothing of the rest; and the loss of finite anchors is finite
afterwards.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmseg.registry import MODELS

from fuzzing import (
    DTYPES,
    INF,
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

BANKS = {
    'mean': dict(type='PrototypeBank'),
    'ema': dict(type='PrototypeBank', clock='ema', new_weight=.3),
    'latest': dict(type='PrototypeBank', clock='batch', normalize=True),
    'several': dict(type='PrototypeBank', prototypes=3),
    'transport': dict(
        type='PrototypeBank', prototypes=2, assign='transport',
        compare='prototype', distance_weight=.1),
    'gaussian': dict(type='GaussianBank'),
    'gaussian ema': dict(
        type='GaussianBank', clock='ema', new_weight=.3, normalize='rows'),
    'pixels': dict(type='PixelQueue', length=4, number=2),
    'half': dict(type='PixelQueue', length=4, number=2, dtype='float16'),
    'segments': dict(type='SegmentQueue', length=4),
    'batches': dict(
        type='SegmentQueue', length=4, segment='batch', normalize=False,
        energy='mean'),
    'memory': dict(type='MemoryBank', pixels=4, segments=3, number=2),
    'batch': dict(type='BatchBank'),
    'tokens': dict(type='PrototypeTokens', prototypes=2),
}
NAMES = st.sampled_from(sorted(BANKS))
STATEFUL = sorted(set(BANKS) - {'batch', 'tokens'})
CLASSES = st.integers(1, 4)
DIMS = st.integers(1, 4)
SMALL = st.integers(0, 7)


def bank_of(name, classes, channels):
    torch.manual_seed(0)
    return MODELS.build(dict(
        BANKS[name], num_classes=classes, channels=channels))


def update(bank, draw, vectors, labels):
    number = len(vectors)
    bank.update(vectors, labels, draw.uniform(number),
                draw.integers(2, number), 2)


def floats(bank):
    return [one for one in bank.state_dict().values()
            if one.is_floating_point()]


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(mine, theirs[key])
               for key, mine in one.state_dict().items())


@fuzz(120)
@given(SEEDS, NAMES, LABELS, LABELS, CLASSES, DIMS, SMALL, DTYPES, TAUS,
       st.sampled_from(['energy', 'positive']),
       st.sampled_from(['mean', 'lse']), st.integers(0, 2))
def test_fuzz_bank_of_finite_vectors(seed, name, kind, anchor_kind, classes,
                                     channels, number, dtype, tau, own,
                                     reduce_positives, updates):
    draw = Draw(seed)
    bank = bank_of(name, classes, channels)
    for _ in range(updates):
        update(bank, draw, draw.normal(number, channels, dtype=dtype),
               draw.labels(kind, classes, number))
    anchors = draw.normal(number, channels, dtype=dtype).requires_grad_()
    labels = draw.labels(anchor_kind, classes, number)
    loss = bank.loss(anchors, labels, tau, own,
                     reduce_positives=reduce_positives)
    assert loss.dim() == 0 and finite(loss, *gradients(loss, anchors))
    assert finite(*floats(bank))
    if anchor_kind == 'ignored':
        assert loss == 0
    vectors, exists = bank.centres()
    assert finite(vectors) and (vectors[~exists] == 0).all()


@fuzz(120)
@given(SEEDS, st.sampled_from(STATEFUL), POISON, CLASSES, DIMS,
       st.integers(1, 7), DTYPES, st.integers(0, 2))
def test_fuzz_no_bank_takes_in_what_is_no_number(
        seed, name, poison, classes, channels, number, dtype, before):
    draw = Draw(seed)
    bank = bank_of(name, classes, channels)
    for _ in range(before):
        update(bank, draw, draw.normal(number, channels),
               draw.labels('any', classes, number))
    vectors = draw.normal(number, channels, dtype=dtype)
    labels = draw.labels('any', classes, number)
    broken = draw.chance(number)
    spoilt = set(labels[broken].tolist())
    vectors[broken, draw.integers(channels, 1)] = poison
    clean = copy.deepcopy(bank)
    state = draw.generator.get_state()
    update(bank, draw, vectors, labels)
    assert finite(*floats(bank))
    # a class without such a vector is as if there had been none of them
    draw.generator.set_state(state)
    update(clean, draw, vectors.nan_to_num(0., 0., 0.), labels)
    theirs = clean.state_dict()
    for key, mine in bank.state_dict().items():
        for c in range(classes):
            if c not in spoilt:
                torch.testing.assert_close(
                    mine[c], theirs[key][c], msg=f'{key}[{c}]')
    loss = bank.loss(draw.normal(number, channels), labels, .1, 'energy')
    assert finite(loss)


@pytest.mark.parametrize('name', STATEFUL)
@pytest.mark.parametrize('poison', [NAN, INF, -INF])
def test_fuzz_a_bank_is_untouched_by_a_batch_of_nan(name, poison):
    draw = Draw(3)
    bank = bank_of(name, 3, 4)
    update(bank, draw, draw.normal(12, 4), torch.arange(12) % 3)
    before = copy.deepcopy(bank)
    update(bank, draw, torch.full((12, 4), poison), torch.arange(12) % 3)
    assert (bank.age == before.age + 1).all()
    bank.age.copy_(before.age)
    for part, old in zip(bank.modules(), before.modules(), strict=True):
        if hasattr(part, 'age'):
            part.age.copy_(old.age)
    assert same(bank, before)


@pytest.mark.parametrize('name', ['mean', 'ema', 'gaussian'])
def test_fuzz_vectors_too_large_for_their_variance(name):
    """Finite ones, whose squares are not."""
    bank = bank_of(name, 2, 3)
    draw = Draw(0)
    update(bank, draw, draw.normal(6, 3), torch.arange(6) % 2)
    update(bank, draw, draw.normal(6, 3) * 3e38, torch.zeros(6).long())
    assert finite(*floats(bank))


def test_fuzz_half_queue_leaves_out_what_overflows():
    """65,504 is the largest number of half precision."""
    bank = bank_of('half', 1, 2)
    vectors = torch.tensor([[1., 2.], [7e4, 0.], [3., 4.]])
    bank.update(vectors, torch.zeros(3).long(), torch.tensor([.1, .2, .3]))
    assert bank.filled.tolist() == [1]  # two were drawn, one was stored
    assert bank.keys[0, 0].tolist() == [3., 4.]


# -- the state of ProDA and of thresholds by class -------------------------


@fuzz(40)
@given(SEEDS, POISON, LABELS, CLASSES, DIMS, st.integers(1, 6))
def test_fuzz_prototype_state(seed, poison, kind, classes, channels, side):
    draw = Draw(seed)
    state = MODELS.build(dict(
        type='PrototypeState', num_classes=classes, channels=channels,
        min_pixels=2))
    labels = draw.labels(kind, classes, 2, side, side)
    state.take(draw.normal(2, channels, side, side), labels)
    mean, count = state.mean.clone(), state.count.clone()
    state.take(torch.full((2, channels, side, side), poison), labels)
    assert torch.equal(state.mean, mean) and torch.equal(state.count, count)
    features = draw.normal(2, channels, side, side)
    features[1] = poison
    state.take(features, labels)
    assert finite(state.mean)


@fuzz(40)
@given(SEEDS, POISON, CLASSES, st.integers(1, 6),
       st.sampled_from(['cbst', 'spcl']))
def test_fuzz_histograms(seed, poison, classes, side, rule):
    draw = Draw(seed)
    policy = MODELS.build(dict(
        type='ClassThresholds', num_classes=classes, rule=rule, bins=64))
    probs = draw.probabilities(2, classes, side, side)
    broken = draw.chance(2, side, side)
    policy.count(probs, ~broken)
    want = policy.histogram.clone()
    policy.histogram.zero_()
    policy.count(probs.masked_fill(broken.unsqueeze(1), poison))
    assert torch.equal(policy.histogram, want)
    assert finite(policy.thresholds())
