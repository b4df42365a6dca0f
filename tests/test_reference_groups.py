"""Learning rates and decays of DAFormer's 1086 tensors."""

import logging
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

CONFIG = (Path(__file__).resolve().parent.parent / 'configs' / 'daformer' /
          'daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py')


def test_reference_parameter_groups():
    """34 / 322 / 730 published tensors in three groups, and a quiet log."""
    cfg = Config.fromfile(CONFIG)
    model = MODELS.build(cfg.model)
    backbone, head = model.segmentor.backbone, model.segmentor.decode_head
    assert sum(p.numel() for p in backbone.parameters()) == 81443008
    assert sum(p.numel() for p in head.parameters()) == 3712275
    # Frozen tensors of the student would have a warning each.
    frozen = head.fuse_layer.bottleneck.bn.requires_grad_(False)
    wrapper_cfg = cfg.optim_wrapper.copy()
    constructor = wrapper_cfg.pop('constructor')
    records = []
    handler = logging.Handler()
    logger = MMLogger.get_current_instance()
    filters = len(logger.filters)
    handler.setLevel(logging.INFO)
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
            type=constructor, paramwise_cfg=wrapper_cfg.pop('paramwise_cfg'),
            optim_wrapper_cfg=wrapper_cfg))(model)
    finally:
        logger.removeHandler(handler)
    # One table; nothing of the frozen tensors, 982 of them the teacher's.
    assert len(records) == 1
    assert len(logger.filters) == filters
    assert 'Parameter groups' in records[0].getMessage()

    groups = wrapper.optimizer.param_groups
    assert len(groups) == 3
    joined = {id(p) for name, p in model.named_parameters()
              if '.in_proj_' in name}
    tensors = Counter()
    for group in groups:
        # Queries, and keys with values, are one tensor in mmseg.
        tensors[round(group['lr'], 9), group['weight_decay']] = sum(
            2 if id(p) in joined else 1 for p in group['params'])
    assert tensors == {(6e-4, 0.01): 34 - 2, (6e-5, 0.0): 322,
                       (6e-5, 0.01): 730}
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    # Neither teacher nor frozen backbone.
    inside = {id(p) for group in groups for p in group['params']}
    assert inside == {id(p) for p in model.segmentor.parameters()
                      if p.requires_grad}
    assert len(list(frozen.parameters())) == 2
