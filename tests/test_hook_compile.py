"""Compiled networks: the same numbers, the same names, one compilation."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import batch, build, dacs_parts, tiny_student
from methods import tiny_model
from mmseg_contrast.engine.hooks import CompileHook


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    hook = CompileHook(**{'backend': 'eager', **options})
    hook.before_train(SimpleNamespace(model=model))
    return hook


def steps(make, number, prepare):
    """Losses of some steps, and the model after them."""
    model, size = make()
    prepare(model)
    wrapper = build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor='UDAOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-3, eps=1e-3)))
    found = []
    for i in range(number):
        logs = model.train_step(
            batch(size, num_classes=model.num_classes, seed=i), wrapper)
        found.append({key: float(value.detach())
                      for key, value in logs.items()})
    return found, model


def compare(make, prepare=compiled):
    wanted, plain = steps(make, 3, lambda model: None)
    found, model = steps(make, 3, prepare)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    states = model.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-4,
                                   atol=1e-5, msg=key)


def test_each_iteration_begins_a_step_of_cuda_graphs(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin',
                        lambda: begun.append(1))
    hook = CompileHook(backend='eager')
    for i in range(3):
        hook.before_train_iter(SimpleNamespace(), i, {})
    assert len(begun) == 3


def with_classifier(dropout=0.):
    """DACS and an objective that reads what the head classifies."""
    return build(tiny_student(dropout=dropout), **dacs_parts(objectives=dict(
        source=dict(type='Segmentation', view='source'),
        mixed=dict(type='Segmentation', view='mixed_strong'),
        cluda=dict(type='ResolutionContrast', views=('source', ), size=9)))
        ), (32, 32)


def test_steps_are_those_of_the_uncompiled_model():
    compare(with_classifier)


@pytest.mark.slow
def test_steps_with_inductor():
    compare(with_classifier, lambda model: compiled(
        model, backend='inductor'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dacs', 'daformer', 'mic-hrda', 'cluda',
                                  'sepico-dist'])
def test_steps_of_each_method(name):
    compare(lambda: (tiny_model(name, dropout=False)[1], (64, 64)))


@pytest.mark.slow
def test_compiled_dropout_is_drawn_by_position():
    """Other draws than uncompiled, but the same ones each time."""
    def twice():
        return steps(lambda: with_classifier(0.5), 2,
                     lambda model: compiled(model, backend='inductor'))[0]

    first = twice()
    torch.rand(7)  # what others draw does not matter
    assert twice() == first


def test_nothing_is_compiled_twice_though_the_classifier_is_watched():
    counter = CompileCounterWithBackend('eager')
    model, _ = with_classifier()
    compiled(model, backend=counter)
    counts = []
    for i in range(4):
        data = model.data_preprocessor(batch(seed=i), True)
        losses = model(**data, mode='loss')
        assert losses['cluda.loss_source'] > 0
        counts.append(counter.frame_count)
    # Backbone and head, of the student and (another mode) of the teacher.
    assert 2 <= counts[0] <= 4
    assert counts[1:] == [counts[0]] * 3


def test_validation_runs_uncompiled_at_any_size():
    counter = CompileCounterWithBackend('eager')
    model = build()
    hook = compiled(model, backend=counter)
    hook.before_val(None)
    model.eval()
    for side in (32, 40):
        model.segmentor.encode_decode(torch.randn(1, 3, side, side), [dict(
            ori_shape=(side, side), img_shape=(side, side),
            pad_shape=(side, side))])
    assert counter.frame_count == 0
    hook.after_val(None)
    model.train()
    data = model.data_preprocessor(batch(), True)
    model(**data, mode='loss')
    assert counter.frame_count > 0


def test_what_is_compiled():
    _, model = tiny_model('mic-hrda')
    compiled(model)
    names = [name for name, module in model.named_modules()
             if module._compiled_call_impl is not None]
    # HRDA's boxes are outside.
    head = ['decode_head.head', 'decode_head.scale_attention']
    assert names == [
        *(f'segmentor.{one}' for one in ('backbone', *head)),
        *(f'teachers.ema.model.{one}' for one in ('backbone', *head))]
    encoder = model.objectives['feature_distance'].encoder
    assert encoder._compiled_call_impl is not None
    other = build()
    compiled(other, parts=['backbone'], teachers=False)
    assert [name for name, module in other.named_modules()
            if module._compiled_call_impl is not None] == [
                'segmentor.backbone']


@pytest.mark.parametrize('parts', ['backbone', ['head'], []])
def test_wrong_parts_are_named(parts):
    with pytest.raises(ValueError, match='CompileHook.parts'):
        CompileHook(parts=parts)


def test_a_model_without_parts_is_refused():
    with pytest.raises(ValueError, match='Linear has no'):
        CompileHook().before_train(SimpleNamespace(
            model=torch.nn.Linear(2, 2)))
