"""Checkpoints: transparent both ways, for torch's and mmengine's loaders."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from mmseg.registry import MODELS

from helpers import batch, build, dacs_parts, run, tiny_student, total


def trained(steps=3):
    model = build()
    optimizer = torch.optim.SGD(model.segmentor.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        total(run(model, batch(seed=step))).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize('reader', ['torch', 'mmengine'])
def test_the_student_has_a_plain_configs_keys(reader):
    model = trained()
    state = (model.state_dict() if reader == 'torch'
             else get_state_dict(model))
    plain = MODELS.build(tiny_student())
    keys = set(plain.state_dict())
    mine = {k for k in state if k.split('.')[0] not in (
        'teachers', 'clock')}
    assert mine == keys
    plain.load_state_dict({k: state[k] for k in keys})
    for key, value in plain.state_dict().items():
        assert torch.equal(
            value, dict(model.segmentor.state_dict())[key])
    assert not any('segmentor' in key for key in state._metadata)
    assert state._metadata['decode_head.convs.0.bn']['version'] == 2
    # The other parts are there too, each under its own root.
    assert int(state['clock.count']) == 3
    assert int(state['teachers.ema.steps.count']) == 3
    assert 'teachers.ema.model.decode_head.conv_seg.weight' in state


@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_a_round_trip_restores_everything(loader):
    model, other = trained(), build(seed=1)
    state = copy.deepcopy(model.state_dict())
    if loader == 'torch':
        other.load_state_dict(state)
    else:
        load_state_dict(other, state, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert other.clock.now() == 3
    assert other.teachers['ema'].steps.now() == 3
    # And goes on exactly.
    first, second = run(model, batch(seed=9)), run(other, batch(seed=9))
    for key, value in first.items():
        assert torch.equal(second[key], value), key


@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_a_plain_checkpoint_fills_student_and_teachers(loader):
    torch.manual_seed(5)
    plain = MODELS.build(tiny_student())
    model = build()
    state = copy.deepcopy(plain.state_dict())
    before = {k: v.clone() for k, v in state.items()}
    if loader == 'torch':
        model.load_state_dict(state, strict=True)
        assert list(state) == list(before)
    else:
        load_state_dict(model, state, strict=True)
    for net in (model.segmentor, model.teachers['ema'].model):
        for key, value in before.items():
            assert torch.equal(net.state_dict()[key], value), key
    assert model.clock.now() == 0


def test_a_uda_checkpoint_loads_into_another_set_of_parts():
    state = trained().state_dict()
    other = build(**dacs_parts(teachers={}, pseudo_labels={}, views={},
                               objectives=dict(source=dict(
                                   type='Segmentation', view='source'))))
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not missing
    assert all(key.startswith('teachers.ema.') for key in unexpected)
    assert other.clock.now() == 3


def test_prefixed_models_keep_their_prefix():
    """As one part of a larger module: mmengine's TTA and averaged models."""
    outer = torch.nn.ModuleDict(dict(inner=build()))
    state = outer.state_dict()
    assert 'inner.backbone.layers.0.0.weight' in state
    assert 'inner.teachers.ema.steps.count' in state
    again = torch.nn.ModuleDict(dict(inner=build(seed=2)))
    again.load_state_dict(state)
    for key, value in state.items():
        assert torch.equal(again.state_dict()[key], value)


def test_a_deep_copy_is_a_model_of_its_own():
    model = trained()
    model.zero_grad()
    twin = copy.deepcopy(model)
    first, second = run(model, batch()), run(twin, batch())
    for key, value in first.items():
        assert torch.equal(second[key], value)
    total(second).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_keeps_a_step_can_be_copied():
    model = build()
    model.keep_step = True
    run(model, batch())
    assert model.last_step is not None
    assert copy.deepcopy(model).last_step is None
    model.eval()
    assert model.last_step is None


def test_stock_init_and_inference(tmp_path):
    import numpy as np
    from mmengine.config import Config
    from mmseg.apis import inference_model, init_model
    model = trained()
    path = tmp_path / 'uda.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        dataset_meta=dict(classes=list('abcde'),
                          palette=[[i] * 3 for i in range(5)]))), path)
    pipeline = [dict(type='LoadImageFromNDArray'), dict(type='PackSegInputs')]
    cfg = Config(dict(
        default_scope='mmseg',
        model=dict(type='UDASegmentor', segmentor=tiny_student(),
                   predict_with='both', **dacs_parts()),
        test_pipeline=pipeline,
        test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    loaded = init_model(cfg, str(path), device='cpu')
    image = np.random.default_rng(0).integers(
        0, 255, (32, 32, 3), dtype=np.uint8)
    result = inference_model(loaded, image)
    plain = init_model(Config(dict(
        default_scope='mmseg', model=tiny_student(), test_pipeline=pipeline,
        test_dataloader=dict(dataset=dict(pipeline=pipeline)))), str(path),
        device='cpu')
    assert torch.equal(inference_model(plain, image).seg_logits.data,
                       result.seg_logits.data)
    taught = model.eval().teachers['ema'].model
    taught.cfg = plain.cfg
    assert torch.equal(inference_model(taught, image).seg_logits.data,
                       result.teacher_seg_logits.data)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('who', ['student', 'teacher', 'both'])
def test_prediction_by_student_teacher_or_both(mode, who):
    student = tiny_student()
    student['test_cfg'] = dict(mode=mode, crop_size=(16, 16), stride=(8, 8))
    model = build(student, **dacs_parts(predict_with=who)).eval()
    with torch.no_grad():
        for p in model.teachers['ema'].model.parameters():
            p.mul_(1.5)
    data = batch()
    got = model.test_step(dict(
        inputs=data['inputs']['source'],
        data_samples=copy.deepcopy(data['data_samples']['source'])))
    nets = dict(student=model.segmentor, teacher=model.teachers['ema'].model)
    want = {name: net.test_step(dict(
        inputs=data['inputs']['source'],
        data_samples=copy.deepcopy(data['data_samples']['source'])))
        for name, net in nets.items()}
    main = 'student' if who == 'both' else who
    for i in range(2):
        assert torch.equal(got[i].seg_logits.data,
                           want[main][i].seg_logits.data)
        assert ('teacher_pred_sem_seg' in got[i]) is (who == 'both')
        if who == 'both':
            assert torch.equal(got[i].teacher_pred_sem_seg.data,
                               want['teacher'][i].pred_sem_seg.data)
            assert torch.equal(got[i].teacher_seg_logits.data,
                               want['teacher'][i].seg_logits.data)
