"""Switches for speed and memory, and what they leave alone."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import build_from_cfg
from mmseg.registry import HOOKS

from helpers import batch, build, tiny_student
from methods import tiny_model

ROOT = Path(__file__).resolve().parent.parent


def weights(model):
    return {name: value.detach().clone()
            for name, value in model.named_parameters()}


def assert_equal(mine, theirs, close=0.):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=close, atol=close,
                                   msg=name)


def sgd(model, **options):
    return build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor='UDAOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=0.1), **options))


def losses_and_gradients(model, number=2):
    """Of the last of some iterations, without an update."""
    dtype = next(model.parameters()).dtype
    for i in range(number):
        data = model.data_preprocessor(
            batch((64, 64), num_classes=model.num_classes, seed=i), True)
        data['inputs'] = {name: one.to(dtype)
                          for name, one in data['inputs'].items()}
        losses = model(**data, mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    return ({key: value.detach() for key, value in losses.items()},
            {name: p.grad for name, p in model.segmentor.named_parameters()
             if p.grad is not None})


# -- channels_last ---------------------------------------------------------


@pytest.mark.parametrize('name, dtype, close', [
    ('dacs', torch.float64, 1e-8), ('daformer', torch.float32, 1e-5)])
def test_channels_last_is_another_layout_of_the_same(name, dtype, close):
    _, plain = tiny_model(name, dropout=False)
    _, model = tiny_model(name, dropout=False,
                          model=dict(channels_last=True))
    for one in (plain, model):
        one.to(dtype)
    for net in (model.segmentor, model.teachers['ema'].model):
        kernels = [p for p in net.parameters()
                   if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert kernels and all(p.is_contiguous(
            memory_format=torch.channels_last) for p in kernels)
    found, wanted = (losses_and_gradients(one) for one in (model, plain))
    assert_equal(found[0], wanted[0], close)
    assert_equal(found[1], wanted[1], close)
    # Names and values in a checkpoint, and the layout after loading one.
    assert_equal(model.state_dict(), plain.state_dict(), close)
    model.load_state_dict(plain.state_dict())
    assert all(p.is_contiguous(memory_format=torch.channels_last)
               for p in model.segmentor.parameters() if p.dim() == 4)


# -- accumulation and clipping ---------------------------------------------


def test_accumulated_gradients_are_the_mean_over_micro_steps():
    model, single = build(), build()
    wrapper = sgd(model, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 100)
    start = weights(model.segmentor)
    model.train_step(batch(seed=0), wrapper)
    assert_equal(weights(model.segmentor), start)  # not yet
    model.train_step(batch(seed=1), wrapper)
    moved = weights(model.segmentor)

    gradients = []
    for seed in (0, 1):
        data = single.data_preprocessor(batch(seed=seed), True)
        losses = single(**data, mode='loss')
        total = sum(value for key, value in losses.items() if 'loss' in key)
        gradients.append(torch.autograd.grad(
            total, list(single.segmentor.parameters())))
    wanted = {name: start[name] - 0.1 * (a + b) / 2 for name, a, b in zip(
        start, *gradients, strict=True)}
    assert_equal(moved, wanted, 1e-6)
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    # The teacher follows in each micro-step.
    assert model.teachers['ema'].steps.now() == 2


def test_clipped_gradients_are_scaled_to_the_norm():
    model, plain = build(), build()
    start = weights(model.segmentor)
    model.train_step(batch(), sgd(model, clip_grad=dict(max_norm=1e-3)))
    plain.train_step(batch(), sgd(plain))
    steps = [torch.cat([(start[name] - value).flatten() for name, value in
                        weights(one.segmentor).items()])
             for one in (model, plain)]
    assert float(steps[0].norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert float(torch.cosine_similarity(*steps, 0)) > 1 - 1e-5


# -- gradient checkpointing ------------------------------------------------


def test_checkpointed_backbones_give_the_same_step():
    """With stochastic depth: what is dropped is dropped again."""
    runs = [losses_and_gradients(tiny_model(
        'daformer', with_cp=with_cp, drop_path_rate=0.5)[1])
        for with_cp in (True, False)]
    assert_equal(runs[0][0], runs[1][0])
    assert_equal(runs[0][1], runs[1][1], 1e-6)


# -- the documentation -----------------------------------------------------


def documented():
    """Command-line options in the docs."""
    text = (ROOT / 'docs' / 'speed.md').read_text()
    found = re.findall(r'^    --cfg-options ((?:.+)(?:\n {8}.+)*)$', text,
                       re.M)
    return [' '.join(one.split()) for one in found]


def parsed(options):
    result = {}
    for option in options.replace('"', '').split():
        key, value = option.split('=', 1)
        result[key] = DictAction._parse_iterable(value)
    return result


def test_documented_switches_are_found():
    assert len(documented()) >= 8


@pytest.mark.parametrize('switch', documented())
def test_a_documented_switch_exists(switch, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available',
                        lambda: True)
    cfg = Config.fromfile(ROOT / 'configs' / 'daformer' / (
        'daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'))
    cfg.merge_from_dict(parsed(switch))
    for name in {'runtime_info', 'compile'} & set(cfg.default_hooks):
        build_from_cfg(cfg.default_hooks[name], HOOKS)
    segmentor = tiny_student(19)
    backbone = dict(cfg.model.segmentor.backbone, embed_dims=4,
                    num_layers=(1, 1, 1, 1), init_cfg=None)
    segmentor['backbone'] = backbone
    segmentor['decode_head']['in_channels'] = 8
    options = {key: cfg.model[key] for key in ('channels_last', 'backward')
               if key in cfg.model}
    model = build(segmentor, objectives=dict(
        source=cfg.model.objectives.source), **options)
    build_optim_wrapper(model, cfg.optim_wrapper)
