"""mmengine's FSDP strategy, as far as it comes; see test_ddp.py."""

import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'


def train(folder):
    """One process; writes the error with which training ends."""
    # mmengine picks a GPU for each process, whatever the backend is.
    torch.cuda.set_device = lambda number: None
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
    cfg = Config.fromfile(CONFIGS / 'quickstart' / 'uda.py')
    runner = FlexibleRunner(
        model=cfg.model, work_dir=str(folder), cfg=cfg,
        strategy=dict(type='FSDPStrategy', model_wrapper=dict(
            type='MMFullyShardedDataParallel', use_orig_params=True,
            device_id=torch.device('cpu'))),
        train_dataloader=cfg.train_dataloader, train_cfg=cfg.train_cfg,
        optim_wrapper=cfg.optim_wrapper, param_scheduler=cfg.param_scheduler,
        default_hooks=cfg.default_hooks, custom_hooks=cfg.custom_hooks,
        default_scope='mmseg', launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')))
    try:
        runner.train()
    except ValueError as error:
        (folder / 'said.txt').write_text(str(error))
