"""What to do when the memory does not suffice, in the config's words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS

_SAID = ('out of memory', "can't allocate memory", 'not enough memory',
         'STATUS_ALLOC_FAILED', 'Unable to allocate')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    Args:
        error (BaseException): Any.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in _SAID)


def advice(cfg: Mapping[str, Any], on_gpu: bool) -> str:
    """What to make smaller, with its present value.

    Args:
        cfg (Config): The run's.
        on_gpu (bool): Whether the GPU's memory ran out.

    Returns:
        str: Settings in the order in which to try them; never empty.
    """
    loader = cfg.get('train_dataloader') or {}
    batch = loader.get('batch_size')
    smaller = [f'train_dataloader.batch_size = {batch} (with optim_wrapper.'
               'accumulative_counts for the same sum of gradients)']
    size = (cfg.get('data_preprocessor') or {}).get('size')
    smaller.append('the crop of the training pipelines'
                   + (f' (data_preprocessor.size = {tuple(size)})'
                      if size else ''))
    if on_gpu:
        return '; '.join([*_cheaper(cfg), *smaller])
    streams = (loader.get('dataset') or {}).get('streams') or {}
    cached = [f'train_dataloader.dataset.streams.{name}.cache = True'
              for name, stream in streams.items() if stream.get('cache')]
    workers = loader.get('num_workers')
    return '; '.join([*cached, *(
        [f'train_dataloader.num_workers = {workers}'] if workers else []),
        *smaller])


def _cheaper(cfg: Mapping[str, Any]) -> list[str]:
    """What takes less memory for the same batch."""
    found = []
    wrapper = (cfg.get('optim_wrapper') or {}).get('type', 'OptimWrapper')
    if wrapper == 'OptimWrapper':
        found.append("optim_wrapper.type = 'AmpOptimWrapper' (--amp)")
    model = cfg.get('model') or {}
    where = 'model'
    if _takes(model, 'backward') and model.get('backward') != 'sequential':
        found.append("model.backward = 'sequential'")
    if 'segmentor' in model:
        model, where = model['segmentor'], 'model.segmentor'
    backbone = model.get('backbone') or {}
    if _takes(backbone, 'with_cp') and not backbone.get('with_cp'):
        found.append(f'{where}.backbone.with_cp = True')
    return found


def _takes(part: Mapping[str, Any], option: str) -> bool:
    """Whether the class of a config, or one it extends, has an argument."""
    kind = part.get('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    return inspect.isclass(cls) and any(
        option in inspect.signature(one).parameters
        for one in cls.__mro__ if one is not object)
