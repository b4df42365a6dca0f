"""Mixed precision: what is cast, and what is not."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper

from helpers import batch
from methods import METHODS, tiny_model
from mmseg_contrast.ops import fusion
from mmseg_contrast.ops.fusion import add_windows


def step(name, autocast, steps=2, dtype=torch.bfloat16):
    """Losses, gradients and the model of some steps without an update."""
    _, model = tiny_model(name, dropout=False)
    model.keep_step = True
    for i in range(steps):
        data = model.data_preprocessor(
            batch((64, 64), num_classes=19, seed=i), True)
        with torch.autocast('cpu', dtype, enabled=autocast):
            losses = model(**data, mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    return losses, model


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', METHODS)
def test_what_needs_precision_keeps_it_in_every_method(name, dtype):
    plain, exact = step(name, False)
    losses, model = step(name, True, dtype=dtype)
    state = model.last_step
    # Autocast was there.
    assert any(one.features[0].dtype == dtype
               for one in state.students.values())
    for key, value in losses.items():
        assert value.dtype == torch.float32, key
        assert torch.isfinite(value), key
        if 'loss' in key:
            assert float(value.detach()) == pytest.approx(
                float(plain[key].detach()), rel=0.02, abs=1e-3), key
    for key, value in model.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64, torch.bool), key
        assert torch.isfinite(value.float()).all(), key
    # Buffers such as banks and prototypes hold what they would hold.
    wanted = dict(exact.named_buffers())
    for key, value in model.named_buffers():
        if value.is_floating_point() and value.numel() > 1:
            difference = (value - wanted[key]).norm()
            assert difference <= 0.03 * wanted[key].norm() + 1e-3, key
    for view in state.views.values():
        assert view.images.dtype == torch.float32
    for probabilities in state.predictions.values():
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(1), torch.ones_like(
            probabilities[:, 0]), rtol=1e-5, atol=1e-5)
    for pseudo in state.pseudo_labels.values():
        assert pseudo.weights.dtype == pseudo.confidence.dtype == (
            torch.float32)
    mine, theirs = (torch.cat([
        p.grad.flatten() for p in one.segmentor.parameters()
        if p.grad is not None]) for one in (model, exact))
    assert mine.dtype == torch.float32 and torch.isfinite(mine).all()
    # Batch norms of two small images magnify the rounding before them.
    assert torch.cosine_similarity(mine, theirs, 0) > 0.85


@pytest.mark.parametrize('name', ['daformer', 'mic-hrda'])
def test_logits_are_resized_in_full_precision(name, monkeypatch):
    """A half of 8 bits would round them twice."""
    from mmseg.models.decode_heads import decode_head

    from mmseg_contrast.adaptation import heads
    seen = []
    summed = []
    monkeypatch.setattr(
        fusion, 'add_windows', lambda total, windows, boxes: summed.append(
            total.dtype) or add_windows(total, windows, boxes))

    def watch(module, name):
        resize = getattr(module, name)

        def watched(*args, **kwargs):
            first = args[0] if args else kwargs['input']
            if first.shape[1] == 19:
                seen.append((name, first.dtype))
            return resize(*args, **kwargs)
        return watched

    _, model = tiny_model(name)
    data = model.data_preprocessor(batch((64, 64), num_classes=19), True)
    monkeypatch.setattr(decode_head, 'resize', watch(decode_head, 'resize'))
    monkeypatch.setattr(heads.F, 'interpolate', watch(heads.F, 'interpolate'))
    with torch.autocast('cpu', torch.bfloat16):
        model(**data, mode='loss')
    assert {name for name, _ in seen} == {'resize', 'interpolate'}
    assert {dtype for _, dtype in seen} == {torch.float32}
    # The teacher's overlapping windows.
    assert summed == ([torch.float32] if name == 'mic-hrda' else [])


OPTIONS = dict(
    bf16=dict(dtype='bfloat16', loss_scale=dict(enabled=False)),
    fp16=dict(dtype='float16', loss_scale='dynamic'))


@pytest.mark.parametrize('kind', OPTIONS)
def test_the_documented_options_build(kind, monkeypatch):
    """mmengine refuses the CPU: it is told that there is a GPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available',
                        lambda: True)
    cfg, model = tiny_model('dacs')
    cfg.merge_from_dict({'optim_wrapper.type': 'AmpOptimWrapper', **{
        f'optim_wrapper.{key}': value
        for key, value in OPTIONS[kind].items()}})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'AmpOptimWrapper'
    assert wrapper.cast_dtype == dict(
        bf16=torch.bfloat16, fp16=torch.float16)[kind]
    if kind == 'bf16':
        assert not wrapper.loss_scaler.is_enabled()
        before = model.backbone.layer1[0].conv1.weight.detach().clone()
        logs = model.train_step(batch((64, 64), num_classes=19), wrapper)
        assert torch.isfinite(logs['loss'])
        assert not torch.equal(
            model.backbone.layer1[0].conv1.weight.detach(), before)
