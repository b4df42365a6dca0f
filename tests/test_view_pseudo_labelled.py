"""Self-training without mixing: a view with pseudo-labels."""

import pytest
import torch

from helpers import batch, build, dacs_parts, run


def test_a_view_has_labels_and_weights_of_the_policy():
    parts = dacs_parts()
    parts['views'] = dict(
        strong=dict(type='StrongAugment', view='target'),
        labelled=dict(type='PseudoLabelled', view='strong'))
    parts['objectives'] = dict(
        target=dict(type='Segmentation', view='labelled'))
    model = build(**parts)
    model.keep_step = True
    losses = run(model, batch())
    step = model.last_step
    view, pseudo = step.view('labelled'), step.pseudo_label('target')
    assert torch.equal(view.images, step.view('strong').images)
    assert not torch.equal(view.images, step.view('target').images)
    assert torch.equal(view.labels, pseudo.labels)
    assert torch.equal(view.weights, pseudo.weights)
    logits = torch.nn.functional.interpolate(
        step.student('labelled').logits, (32, 32), mode='bilinear')
    want = (torch.nn.functional.cross_entropy(
        logits, pseudo.labels, reduction='none') * pseudo.weights).mean()
    assert losses['target.decode.loss_ce'].item() == pytest.approx(
        want.item(), rel=1e-5)


def test_labels_of_another_crop_are_named():
    parts = dacs_parts()
    parts['pseudo_labels']['crop'] = dict(
        type='ConfidentFraction', view='crop')
    parts['views'] = dict(
        crop=dict(type='BalancedCrop', size=(16, 16),
                  pseudo_label='target'),
        labelled=dict(type='PseudoLabelled', pseudo_label='crop'))
    parts['objectives'] = dict(
        target=dict(type='Segmentation', view='labelled'))
    with pytest.raises(ValueError, match='views.labelled.pseudo_label'):
        run(build(**parts), batch())
