"""Policies of pseudo-labels on any predictions.

What must hold: labels are class ids or 255, weights and confidences are
finite, and where a prediction is no number there is no label and no weight.
"""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from mmseg.registry import MODELS

from fuzzing import IGNORE, POISON, SEEDS, Draw, finite, fuzz
from mmseg_contrast.adaptation.view import View

POLICIES = {
    'fraction': dict(type='ConfidentFraction', threshold=.5),
    'by sample': dict(type='ConfidentFraction', threshold=0.,
                      scope='sample'),
    'without a class': dict(type='ConfidentFraction', threshold=.5,
                            absent_classes=[0]),
    'pixels': dict(type='ConfidentPixels', threshold=.4),
    'all pixels': dict(type='ConfidentPixels', threshold=0.),
    'logits': dict(type='ConfidentPixels', threshold=-5., on='logit'),
    'spcl': dict(type='ClassThresholds', rule='spcl', bins=64),
    'cbst': dict(type='ClassThresholds', rule='cbst', bins=64),
    'rectified': dict(type='PrototypeRectified'),
}


class Step:
    """As much of a step as a policy asks for."""

    def __init__(self, view, logits, features, state):
        self.views = {view.name: view}
        self.logits, self.features = logits, features
        self.states = {'prototypes': state}
        self.logs = {}

    def view(self, name):
        return self.views[name]

    def teacher(self, name, view):
        return self.logits.softmax(1)

    def teacher_pass(self, name, view):
        return SimpleNamespace(
            logits=self.logits, image_logits=self.logits,
            decoder_features=self.features)

    def log(self, key, value):
        self.logs[key] = value


@fuzz(150)
@given(SEEDS, st.sampled_from(sorted(POLICIES)), POISON,
       st.integers(1, 2), st.integers(2, 4), st.integers(1, 5),
       st.integers(1, 5), st.booleans(),
       st.sampled_from(['none', 'some', 'all']), st.booleans())
def test_fuzz_policies(seed, name, poison, samples, classes, height, width,
                       margins, how_many, flat):
    draw = Draw(seed)
    shape = (samples, height, width)
    logits = draw.normal(samples, classes, height, width,
                         scale=0. if flat else 3.)
    features = draw.normal(samples, 3, height, width)
    broken = dict(none=torch.zeros(shape).bool(), some=draw.chance(*shape),
                  all=torch.ones(shape).bool())[how_many]
    # where the logits are no numbers the probabilities are NaN
    logits = logits.masked_fill(broken.unsqueeze(1), poison)
    features = features.masked_fill(broken.unsqueeze(1), poison)
    valid = draw.chance(*shape) if margins else None
    view = View('target', torch.zeros(samples, 3, height, width), 'target',
                valid=valid)
    state = MODELS.build(dict(
        type='PrototypeState', num_classes=classes, channels=3))
    state.take(draw.normal(2, 3, 6, 6), draw.integers(classes, 2, 6, 6))
    options = dict(POLICIES[name])
    if options['type'] in ('ConfidentFraction', 'ClassThresholds'):
        options['num_classes'] = classes
    policy = MODELS.build(options)
    step = Step(view, logits, features, state)
    pseudo = policy(step, 'target')

    assert finite(pseudo.confidence, pseudo.weights, *step.logs.values())
    assert (pseudo.labels[broken] == IGNORE).all()
    assert (pseudo.weights[broken] == 0).all()
    assert ((0 <= pseudo.labels[~broken])
            & (pseudo.labels[~broken] < classes)).all()
    assert (pseudo.weights >= 0).all() and (pseudo.weights <= 1).all()
    if margins:
        assert (pseudo.weights[~valid] == 0).all()
    total = torch.zeros(shape)
    for scale, mask in pseudo.parts:
        total += scale.view(-1, 1, 1) * mask
    assert torch.equal(total, pseudo.weights)
    if pseudo.probs is not None:
        assert finite(pseudo.probs)
    for one in policy.state_dict().values():
        assert finite(one)


@fuzz(40)
@given(SEEDS, st.integers(1, 2), st.integers(1, 4), st.integers(1, 5),
       st.booleans(), st.sampled_from([0., .5, 1.]),
       st.sampled_from([0., .5, 1.]))
def test_fuzz_stored_labels(seed, samples, classes, side, soft, threshold,
                            share):
    draw = Draw(seed)
    there = draw.chance(samples, side, side)
    if soft:
        probs = draw.probabilities(samples, classes, side, side)
        extras = dict(pseudo_probs=probs * there.unsqueeze(1))
    else:
        extras = dict(pseudo_label=draw.integers(
            classes, samples, side, side).masked_fill(~there, IGNORE))
    view = View('target', torch.zeros(samples, 3, side, side), 'target',
                extras=extras)
    policy = MODELS.build(dict(
        type='StoredPseudoLabels', num_classes=classes, threshold=threshold,
        min_share=share))
    step = Step(view, None, None, None)
    pseudo = policy(step, 'target')
    assert (pseudo.weights[~there] == 0).all()
    assert finite(pseudo.weights, pseudo.confidence, *step.logs.values())
    assert (pseudo.labels[~there] == IGNORE).all()
