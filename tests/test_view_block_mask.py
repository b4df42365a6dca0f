"""Masked image consistency (MIC): masks, halves of batches, shared draws."""

import pytest
import torch

from helpers import batch, build, dacs_parts, run, total


def mic_parts(ratio=0.7, mode='separatetrgaug'):
    parts = dacs_parts()
    parts['views']['target_labelled'] = dict(type='PseudoLabelled')
    if mode == 'separatetrgaug':
        parts['views']['target_strong'] = dict(
            type='StrongAugment', view='target_labelled', share_order=True)
    else:
        parts['views']['halves'] = dict(type='Halves')
    parts['views']['masked'] = dict(
        type='BlockMask', block=8, ratio=ratio, view='target_strong' if
        mode == 'separatetrgaug' else 'halves')
    parts['objectives']['masked'] = dict(type='Segmentation', view='masked')
    return parts


def step_of(parts, samples=2, size=(32, 32), **kwargs):
    model = build(**parts, **kwargs)
    model.keep_step = True
    losses = run(model, batch(size, samples))
    return model.last_step, losses, model


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_blocks_are_hidden_and_all_else_is_kept(samples):
    step, losses, _ = step_of(mic_parts(), samples)
    masked, plain = step.view('masked'), step.view('target_strong')
    hidden = (masked.images == 0).all(1)
    assert torch.equal(masked.images, torch.where(
        hidden.unsqueeze(1), 0, plain.images))
    blocks = hidden.view(samples, 4, 8, 4, 8).float().mean((2, 4))
    assert set(blocks.unique().tolist()) == {0., 1.}
    assert torch.equal(masked.labels, step.pseudo_label('target').labels)
    assert torch.equal(masked.weights, step.pseudo_label('target').weights)
    assert masked.weight_parts is step.pseudo_label('target').parts
    assert losses['masked.decode.loss_ce'] > 0
    total(losses).backward()


def test_the_ratio_is_the_share_of_hidden_blocks():
    draw = build(**mic_parts()).views['masked'].draw
    uniforms = draw(50, 64, 128, torch.Generator().manual_seed(0))
    assert uniforms.shape == (50, 8, 16)
    assert (uniforms <= 0.7).float().mean() == pytest.approx(0.7, abs=0.02)


def test_ratio_0_is_plain_consistency():
    """Nothing hidden: the loss on the augmented target itself."""
    parts = mic_parts(ratio=0.)
    _, masked, model = step_of(parts)
    total(masked).backward()
    parts = mic_parts()
    parts['objectives']['masked']['view'] = 'target_strong'
    _, plain, other = step_of(parts)
    total(plain).backward()
    # Dropout aside, of which there is none here, names don't count.
    for key in masked:
        assert torch.equal(masked[key], plain[key]), key
    for one, two in zip(model.segmentor.parameters(),
                        other.segmentor.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    _, different, _ = step_of(mic_parts())
    assert different['masked.decode.loss_ce'] != masked[
        'masked.decode.loss_ce']


def test_ratio_1_hides_everything():
    step, _, _ = step_of(mic_parts(ratio=1.))
    assert not step.view('masked').images.any()


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_half_of_the_batch_is_of_the_source(samples):
    parts = mic_parts(mode='separate')
    step, losses, _ = step_of(parts, samples)
    joined = step.view('halves')
    source, target = step.view('source'), step.view('target_labelled')
    n = samples // 2
    for name in ('images', 'labels'):
        want = torch.cat([getattr(source, name)[:n],
                          getattr(target, name)[:samples - n]])
        assert torch.equal(getattr(joined, name), want)
    q = step.pseudo_label('target').parts[0][0]
    assert 0 < q < 1
    assert (joined.weights[:n] == 1).all()
    assert (joined.weights[n:] == q).all()
    assert torch.equal(joined.weights, sum(
        scale * mask for scale, mask in joined.weight_parts))
    assert joined.extras['origin'][:n].all()
    assert not joined.extras['origin'][n:].any()
    assert joined.domain == 'source+target'
    assert len(joined.metas) == samples
    assert 'masked.agreement' in losses
    total(losses).backward()


@pytest.mark.parametrize('swapped', [False, True])
def test_halves_with_a_weight_for_each_sample_and_margins(swapped):
    parts = mic_parts(mode='separate')
    parts['pseudo_labels']['target']['scope'] = 'sample'
    if swapped:
        parts['views']['halves'] = dict(
            type='Halves', first='target_labelled', second='source')
    model = build(**parts)
    data = model.data_preprocessor(batch(samples=3), True)
    step = model._step(data['inputs'], data['data_samples'])
    valid = torch.rand(3, 32, 32) < 0.5
    step.views['target'] = step.views['target'].replace(valid=valid)
    joined, q = step.view('halves'), step.pseudo_label('target').parts[0][0]
    assert q.shape == (3, )
    taught = slice(0, 1) if swapped else slice(1, 3)
    known = slice(1, 3) if swapped else slice(0, 1)
    count = 1 if swapped else 2
    assert torch.equal(joined.weights[taught],
                       q[:count].view(-1, 1, 1) * valid[:count])
    assert (joined.weights[known] == 1).all()
    assert torch.equal(joined.valid[taught], valid[:count])
    assert joined.valid[known].all()
    torch.testing.assert_close(joined.weights, sum(
        scale.view(-1, 1, 1) * mask for scale, mask in joined.weight_parts))


def test_halves_of_mixed_weights():
    """Weights that are no sum of masks stay without one."""
    model = build(**mic_parts(mode='separate'))
    data = model.data_preprocessor(batch(), True)
    step = model._step(data['inputs'], data['data_samples'])
    source = step.views['source']
    weights = torch.rand(2, 32, 32)
    step.views['source'] = source.replace(weights=weights)
    joined = step.view('halves')
    assert joined.weight_parts is None
    assert torch.equal(joined.weights[0], weights[0])


def test_a_teacher_and_a_threshold_of_its_own():
    parts = mic_parts()
    parts['teachers']['slow'] = dict(type='EMATeacher', alpha=0.9)
    parts['pseudo_labels']['sure'] = dict(
        type='ConfidentFraction', teacher='slow', threshold=0.)
    parts['views']['target_labelled']['pseudo_label'] = 'sure'
    step, _, _ = step_of(parts)
    assert (step.view('masked').weights == 1).all()
    assert (step.view('mixed').weights < 1).any()
    assert set(step.predictions) == {('ema', 'target'), ('slow', 'target')}


def test_an_order_and_a_sigma_for_the_batch():
    model = build(**mic_parts())
    gen = torch.Generator()
    shared = model.views['target_strong'].draw(8, gen.manual_seed(1))
    each = model.views['mixed_strong'].draw(8, gen.manual_seed(1))
    for name in ('order', 'sigma'):
        assert torch.equal(shared[name], each[name][:1].expand_as(
            each[name]))
        assert len(each[name].unique(dim=0)) > 1
    assert torch.equal(shared['factors'], each['factors'])
    images = torch.rand(8, 3, 16, 16)
    shared.update(jitter=True, blur=True)
    model.views['target_strong'].augment(images, shared)


def test_masks_are_a_function_of_position():
    def hidden(model):
        run(model, batch())
        return model.last_step.view('masked').images == 0

    models = [build(**mic_parts()) for _ in range(2)]
    for model in models:
        model.keep_step = True
    first = hidden(models[0])
    assert torch.equal(hidden(models[1]), first)
    assert not torch.equal(hidden(models[0]), first)


@pytest.mark.parametrize('change, message', [
    (dict(ratio=1.2), r'views.masked.ratio must lie in \[0, 1\]'),
    (dict(block=0), 'views.masked.block must be at least 1')])
def test_wrong_arguments_are_named(change, message):
    parts = mic_parts()
    parts['views']['masked'].update(change)
    with pytest.raises(ValueError, match=message):
        build(**parts)


def test_views_that_cannot_be_joined_are_named():
    parts = mic_parts(mode='separate')
    parts['views']['halves']['second'] = 'target'
    with pytest.raises(ValueError, match="halves joins views with labels, "
                                         "but 'target' has none"):
        run(build(**parts), batch())
    model = build(**mic_parts(mode='separate'))
    data = model.data_preprocessor(batch(), True)
    step = model._step(data['inputs'], data['data_samples'])
    source = step.views['source']
    step.views['source'] = source.replace(
        images=source.images[:1], labels=source.labels[:1])
    with pytest.raises(ValueError, match=r"'source' is \(1, 3, 32, 32\) and"):
        step.view('halves')
