"""One pass of the backbone over several views equals a pass over each."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper

from helpers import batch, build, dacs_parts, double, run, tiny_student
from mmseg_contrast.adaptation import backward

TOGETHER = ('source', 'mixed_strong')


def student(**backbone):
    """A SegFormer, as small as it gets; batch norms in the head alone."""
    config = tiny_student(in_channels=[8, 8, 8, 8], in_index=[0, 1, 2, 3],
                          type='SegformerHead')
    for key in ('num_convs', 'concat_input'):
        del config['decode_head'][key]
    return dict(
        config, backbone=dict(
            type='SDPAMixVisionTransformer', embed_dims=8,
            num_layers=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
            patch_sizes=(7, 3, 3, 3), sr_ratios=(8, 4, 2, 1), mlp_ratio=2,
            **{'drop_path_rate': 0., **backbone}))


def make(segmentor=None, **parts):
    return build(segmentor or student(), **dacs_parts(**parts))


def train(model, steps=3):
    model.double()
    optim_wrapper = OptimWrapper(torch.optim.SGD(
        model.segmentor.parameters(), 0.1, momentum=0.9))
    optim_wrapper.initialize_count_status(model, 0, steps)
    return [model.train_step(double(batch(seed=i)), optim_wrapper)
            for i in range(steps)]


@pytest.mark.parametrize('mode', backward.MODES)
def test_training_is_the_same_with_fewer_passes(mode):
    models, logs, passes = [], [], []
    for together in ((), TOGETHER):
        model = make(backward=mode, joint_views=together)
        seen = []
        model.segmentor.backbone.register_forward_pre_hook(
            lambda _, images, seen=seen: seen.append(len(images[0])))
        logs.append(train(model))
        models.append(model)
        passes.append(seen)
    assert passes == [[2, 2] * 3, [4] * 3]
    for said, other in zip(*logs, strict=True):
        assert set(said) == set(other)
        for key, value in said.items():
            assert other[key].item() == pytest.approx(
                value.item(), rel=1e-9), key
    other = models[1].state_dict()
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(
            other[key], value, rtol=1e-8, atol=1e-10, msg=key)
    fresh = make().double().segmentor.backbone.state_dict()
    assert any(not torch.equal(value, fresh[key]) for key, value in
               models[1].segmentor.backbone.state_dict().items())


def test_what_shares_a_pass_shares_a_backward():
    assert make().groups == [['source'], ['mixed']]
    assert make(joint_views=TOGETHER).groups == [['source', 'mixed']]


def test_draws_are_those_of_the_iteration():
    one, two = (make(student(drop_path_rate=0.5), joint_views=TOGETHER)
                for _ in range(2))
    torch.manual_seed(7)  # as in a process that was resumed
    first = run(one, batch())
    torch.manual_seed(8)
    for key, value in run(two, batch()).items():
        assert torch.equal(first[key], value), key
    other = run(make(student(drop_path_rate=0.5)), batch())
    assert not torch.equal(
        first['source.decode.loss_ce'], other['source.decode.loss_ce'])


def test_batches_of_different_length():
    # Two images and one: each view gets its own back.
    model = make(joint_views=TOGETHER).eval()
    model.adapter.segmentor.backbone.eval()
    step = model._step(*prepared(model))
    views = [step.view('source'), step.view('target').replace(
        images=step.view('target').images[:1])]
    for view, (stages, features) in zip(
            views, model.adapter.joint_features(views), strict=True):
        assert len(stages) == 4
        want = model.segmentor.extract_feat(view.images)
        for stage, same, other in zip(stages, features, want, strict=True):
            torch.testing.assert_close(stage, other, rtol=1e-4, atol=1e-5)
            assert torch.equal(stage, same)  # there is no neck


def prepared(model):
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    return data['inputs'], data['data_samples']


@pytest.mark.parametrize('names', [
    ('source',), ('source', 'source'), ('source', 'mixed')])
def test_views_that_nobody_sees_are_named(names):
    with pytest.raises(ValueError, match=r"model\.joint_views = .* must name "
                       r"two or more .*\['mixed_strong', 'source'\]"):
        make(joint_views=names)


def test_students_that_cannot_are_named():
    with pytest.raises(ValueError, match='model.joint_views: TinyBackbone has '
                       'batch norms'):
        make(tiny_student(), joint_views=TOGETHER)
    config = dict(student(), type='HRDASegmentor', detail_size=(16, 16))
    config['decode_head'] = dict(
        type='HRDAHead', head=config['decode_head'],
        attention=dict(channels=8, embed_dims=8))
    with pytest.raises(ValueError, match='HRDASegmentor extracts features'):
        make(config, joint_views=TOGETHER)


def test_images_of_different_size_are_named():
    model = make(joint_views=TOGETHER)
    step = model._step(*prepared(model))
    small = step.view('target').replace(
        images=step.view('target').images[..., :16])
    with pytest.raises(ValueError, match='model.joint_views: images .* same'):
        model.adapter.joint_features([step.view('source'), small])


def test_labels_by_a_pass_that_waits_for_them_are_refused():
    model = make(
        joint_views=('target', 'mixed_strong'),
        pseudo_labels=dict(target=dict(
            type='ConfidentPixels', teacher='student')),
        objectives=dict(
            dacs_parts()['objectives'],
            target=dict(type='Segmentation', view='target')))
    data = batch()
    data['data_samples']['target'] = data['data_samples']['source']
    with pytest.raises(ValueError, match='labelled by the student'):
        run(model, data)
