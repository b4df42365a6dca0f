"""Views of any size, made of images of which parts are no numbers.

What must hold: finite images give finite ones, with labels of the same
pixels and weights that are finite; what is not finite stays in its own
image; and what can't be made is refused in a sentence.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmseg.registry import MODELS

from fuzzing import IGNORE, LABELS, POISON, SEEDS, Draw, finite, fuzz
from mmseg_contrast.adaptation.pseudo_labels import PseudoLabels
from mmseg_contrast.adaptation.view import View

MEAN, STD = (torch.tensor(one).view(3, 1, 1) for one in (
    (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))


class Step:
    """A source, a target and its pseudo-labels."""

    def __init__(self, draw, samples, classes, height, width, kind):
        shape = (samples, height, width)
        self.draw = draw
        self.views = {
            name: View(name, draw.normal(samples, 3, height, width), name,
                       metas=[{}] * samples)
            for name in ('source', 'target')}
        self.views['source'].labels = draw.labels(kind, classes, *shape)
        mask = draw.chance(*shape)
        share = draw.uniform(1)[0]
        self.pseudo = PseudoLabels(
            'target', draw.labels('any', classes, *shape),
            draw.uniform(*shape), share * mask, ((share, mask), ))

    def view(self, name):
        return self.views[name]

    def pseudo_label(self, name):
        return self.pseudo

    def generator(self, name):
        return self.draw.generator


MODULES = {
    'class_mix': dict(type='ClassMix'),
    'own_classes': dict(
        type='ClassMix', class_scope='sample', mix_ignore=False),
    'strong': dict(type='StrongAugment', view='source',
                   jitter_probability=1., blur_probability=1.),
    'shared': dict(type='StrongAugment', view='target', share_order=True,
                   jitter_strength=1., blur_sigma=(.01, 9.)),
    'blocks': dict(type='BlockMask', view='source', block=3),
    'labelled': dict(type='PseudoLabelled'),
    'halves': dict(type='Halves', second='labelled'),
    'crop': dict(type='BalancedCrop', size=(2, 3)),
}


def module(name, classes):
    options = dict(MODULES[name])
    if options['type'] in ('ClassMix', 'BalancedCrop'):
        options['num_classes'] = classes
    if options['type'] == 'StrongAugment':
        options['normalize'] = (MEAN, STD)
    return MODELS.build(options)


def made(name, step, classes):
    if name == 'halves':
        step.views['labelled'] = module('labelled', classes)(
            step, 'labelled')
    return module(name, classes)(step, 'made')


@fuzz(150)
@given(SEEDS, st.sampled_from(sorted(MODULES)), LABELS, st.integers(1, 3),
       st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_fuzz_views(seed, name, kind, samples, classes, height, width):
    draw = Draw(seed)
    step = Step(draw, samples, classes, height, width, kind)
    if name == 'crop' and (height < 2 or width < 3):
        with pytest.raises(ValueError, match='does not fit'):
            made(name, step, classes)
        return
    view = made(name, step, classes)
    assert finite(view.images, view.weights)
    assert len(view.metas) == samples
    assert view.images.shape[2:] == (
        (2, 3) if name == 'crop' else (height, width))
    if view.labels is not None and kind != 'out of range':
        assert ((view.labels < classes) | (view.labels == IGNORE)).all()
    if view.weight_parts is not None:
        total = torch.zeros_like(view.weights)
        for scale, mask in view.weight_parts:
            total += scale.view(-1, 1, 1) * mask
        torch.testing.assert_close(total, view.weights)


@fuzz(80)
@given(SEEDS, st.sampled_from(sorted(MODULES)), POISON, st.integers(2, 3),
       st.integers(7, 9), st.integers(7, 9))
def test_fuzz_what_is_no_number_stays_in_its_image(seed, name, poison,
                                                   samples, height, width):
    def view(spoil):
        draw = Draw(seed)
        step = Step(draw, samples, 3, height, width, 'any')
        if spoil:
            for one in step.views.values():
                one.images[0, :, 1, 2] = poison
        return made(name, step, 3)

    clean, spoilt = view(False), view(True)
    # the batch of Halves has the first of the second view in its middle
    mine = [i for i in range(samples)
            if i and not (name == 'halves' and i == samples // 2)]
    assert torch.equal(spoilt.images[mine], clean.images[mine])
    for key in ('labels', 'weights'):
        if getattr(clean, key) is not None:
            assert torch.equal(getattr(spoilt, key), getattr(clean, key))
