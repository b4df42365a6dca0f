"""On a GPU every method gives what it gives on the CPU, and never waits."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from helpers import batch
from methods import METHODS, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]


def trained(name, device, amp=None, steps=3):
    """Logged values of some steps, of a net without dropout."""
    cfg, model = tiny_model(name, dropout=False)
    model.to(device).train()
    # Where gradients are clipped, or scaled, PyTorch itself reads a norm.
    options = dict(cfg.optim_wrapper, clip_grad=None)
    if amp:
        options.update(type='AmpOptimWrapper', dtype=amp, loss_scale=(
            'dynamic' if amp == 'float16' else dict(enabled=False)))
    wrapper = build_optim_wrapper(model, options)
    logged = []
    for i in range(steps):
        data = batch((64, 64), num_classes=19, seed=i)
        # The first step makes buffers; a scaler looks at its flag.
        quiet = device == 'cuda' and i > 0 and amp != 'float16'
        if quiet:
            torch.cuda.set_sync_debug_mode('error')
        try:
            logged.append(model.train_step(data, wrapper))
        finally:
            if quiet:
                torch.cuda.set_sync_debug_mode('default')
    return model, [{key: value.float().cpu() for key, value in one.items()}
                   for one in logged]


@pytest.mark.parametrize('name', METHODS)
def test_gpu_losses_are_those_of_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    _, want = trained(name, 'cpu')
    model, found = trained(name, 'cuda')
    assert {one.device.type for one in model.parameters()} == {'cuda'}
    # All draws are made on the CPU. Later steps magnify the rounding.
    for key, value in want[0].items():
        torch.testing.assert_close(
            found[0][key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert all(value.isfinite().all() for one in found
               for value in one.values())


@pytest.mark.parametrize('amp', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', METHODS)
def test_gpu_half_precision_is_near_and_finite(name, amp):
    _, want = trained(name, 'cuda')
    model, found = trained(name, 'cuda', amp)
    for key, value in want[0].items():
        if 'loss' in key:
            torch.testing.assert_close(
                found[0][key], value, rtol=0.03, atol=3e-3, msg=key)
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        assert value.dtype not in (torch.float16, torch.bfloat16), key
