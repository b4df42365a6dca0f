"""Whole iterations on degenerate batches.

What must hold: with finite images losses and gradients are finite, whatever
labels there are; with images that are no numbers a loss or the gradients show
it (both are what NaNGuardHook looks at), while banks, prototypes and
histograms stay finite.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import LABELS, POISON, SEEDS, Draw, finite, fuzz
from helpers import build, dacs_parts, sample, tiny_student, total
from mmseg_contrast.contrast import Bank

HEAD = dict(
    type='ContrastHead', in_channels=8, in_index=1, num_classes=5,
    channels=4, projection=dict(layers=1), tau=.1)
STRONG = dict(type='StrongAugment', view='target')
METHODS = {
    'dacs': {},
    'thresholds': dict(pseudo_labels=dict(target=dict(
        type='ClassThresholds', bins=64))),
    'mic': dict(
        views=dict(
            labelled=dict(type='PseudoLabelled'),
            strong=dict(type='StrongAugment', view='labelled'),
            masked=dict(type='BlockMask', view='strong', block=8)),
        objectives=dict(
            source=dict(type='Segmentation', view='source'),
            masked=dict(type='Segmentation', view='masked'))),
    'proda': dict(
        state=dict(prototypes=dict(type='PrototypeState', channels=8)),
        pseudo_labels=dict(target=dict(type='PrototypeRectified')),
        views=dict(target_strong=STRONG),
        objectives=dict(
            source=dict(type='Segmentation', view='source'),
            denoised=dict(type='SymmetricCrossEntropy',
                          view='target_strong'),
            near=dict(type='PrototypeConsistency'))),
    'cluda': dict(objectives=dict(
        source=dict(type='Segmentation', view='source'),
        cluda=dict(type='ResolutionContrast'))),
    **{bank: dict(bank=bank) for bank in (
        'PrototypeBank', 'GaussianBank', 'PixelQueue', 'SegmentQueue',
        'MemoryBank', 'BatchBank')},
}


def model_of(method):
    options = dict(METHODS[method])
    bank = options.pop('bank', None)
    student = tiny_student()
    parts = dacs_parts(**options)
    if bank is not None:
        student['auxiliary_head'] = dict(HEAD, bank=dict(type=bank))
        parts['objectives']['contrast'] = dict(type='Contrast')
    return build(student, **parts)


def batch_of(draw, kind, samples, size):
    labels = draw.labels(kind, 5, samples, *size)
    labels[labels == -1] = 255  # mmseg's losses count on a known label
    labels[labels > 4] = 255
    images = {name: (255 * draw.uniform(samples, 3, *size))
              for name in ('source', 'target')}
    return dict(inputs={name: list(one) for name, one in images.items()},
                data_samples=dict(
                    source=[sample(one, size) for one in labels],
                    target=[sample(None, size) for _ in range(samples)]))


def losses_of(model, data):
    return model(**model.data_preprocessor(data, True), mode='loss')


@fuzz(40)
@given(SEEDS, st.sampled_from(sorted(METHODS)), LABELS, st.integers(1, 2),
       st.sampled_from([(32, 32), (16, 32), (8, 8)]))
def test_fuzz_iterations(seed, method, kind, samples, size):
    draw = Draw(seed)
    model = model_of(method)
    model.segmentor.data_preprocessor.size = size
    # one value for each channel has no variance
    samples = 2 if size == (8, 8) else samples
    for _ in range(2):
        losses = losses_of(model, batch_of(draw, kind, samples, size))
        assert finite(*losses.values())
        model.zero_grad()
        total(losses).backward()
        assert finite(*(one.grad for one in model.segmentor.parameters()))


@fuzz(25)
@given(SEEDS, st.sampled_from(sorted(METHODS)), POISON,
       st.sampled_from(['source', 'target']))
def test_fuzz_images_that_are_no_numbers(seed, method, poison, stream):
    draw = Draw(seed)
    model = model_of(method)
    losses_of(model, batch_of(draw, 'any', 2, (32, 32)))
    data = batch_of(draw, 'any', 2, (32, 32))
    data['inputs'][stream][0][1, 3:9, 4:20] = poison
    losses = losses_of(model, data)
    state = {}
    for group in (model.state, model.pseudo_labels):
        state.update(group.state_dict())
    for part in model.modules():
        if isinstance(part, Bank):
            state.update(part.state_dict())
    assert finite(*state.values())
    model.zero_grad()
    total(losses).backward()
    grads = [one.grad for one in model.segmentor.parameters()
             if one.grad is not None]
    if stream == 'source':
        assert not finite(total(losses))
    elif poison != poison:
        # A cross entropy shows no NaN where it is ignored, its gradients do.
        # (Colour jitter clamps what is infinite.)
        assert not finite(*grads)


def test_fuzz_a_teacher_that_predicts_nan_labels_nothing():
    model = build()
    draw = Draw(0)
    with torch.no_grad():
        for one in model.teachers['ema'].model.parameters():
            one.fill_(float('nan'))
    model.teachers['ema'].update = lambda student: 1.
    model.keep_step = True
    losses = losses_of(model, batch_of(draw, 'any', 2, (32, 32)))
    assert finite(*losses.values())
    step = model.last_step
    pseudo = step.pseudo_labels['target']
    assert (pseudo.labels == 255).all() and (pseudo.weights == 0).all()
    mixed = step.view('mixed')
    origin = mixed.extras['origin']
    assert torch.equal(mixed.weights, origin.float())
    assert (mixed.labels[~origin] == 255).all()
