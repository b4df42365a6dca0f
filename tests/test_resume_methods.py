"""Every method goes on from its checkpoint to the last bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from test_ddp import CONFIGS, METHODS
from tiny_run import same

from ddp_methods import make_batch, prepare, shrink

STEPS = 4


def build(name):
    """A small model of a shipped config, its optimizer and its config."""
    cfg = shrink(Config.fromfile(CONFIGS / f'{name}.py'))
    model = prepare(cfg)
    return cfg, model, OptimWrapper(torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-3))


def step(cfg, model, optimizer, number, adapts):
    # A supervised net draws its dropout from torch's own generator; all of
    # adaptation is drawn by position.
    torch.manual_seed(torch.seed() if adapts else number)
    num_classes = cfg.pair.num_classes if 'pair' in cfg else 19
    logged = model.train_step(
        make_batch(cfg, num_classes, number, False), optimizer)
    return {key: float(value.detach()) for key, value in logged.items()}


@pytest.mark.parametrize('name', METHODS)
def test_resume_of_a_method(name):
    hub = MessageHub.get_instance(f'resume {name}')
    hub.update_info('max_iters', 100)
    hub.update_info('seed', 0)
    cfg, model, optimizer = build(name)
    adapts = hasattr(model, 'objectives')
    for number in range(STEPS // 2):
        step(cfg, model, optimizer, number, adapts)
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(),
                    optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    _, other, again = build(name)
    other.load_state_dict(saved['model'])
    again.load_state_dict(copy.deepcopy(saved['optimizer']))
    for number in range(STEPS // 2, STEPS):
        one = step(cfg, model, optimizer, number, adapts)
        assert one == step(cfg, other, again, number, adapts)
    same(dict(other.state_dict()), dict(model.state_dict()), name)
    same(again.state_dict(), optimizer.state_dict(), 'optimizer')
