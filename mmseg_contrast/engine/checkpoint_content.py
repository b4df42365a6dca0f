"""What is in a checkpoint: tensors and Python's own types, and no more."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor

# Marks a history of a logged scalar that was taken apart.
_HISTORY = 'mmseg_contrast.history'
_AS_THEY_ARE = (str, bytes, bool, int, float, type(None), torch.dtype,
                torch.device, torch.Size)


class _NotPlain(Exception):
    """An object that has no plain form; its argument is the object."""


def make_plain(checkpoint: dict) -> None:
    """Turn a checkpoint into what ``weights_only=True`` reads anywhere.

    numpy's scalars become numbers, its arrays lists, config dicts dicts,
    paths strings, and the histories of logged scalars pairs of tensors.
    Any other object is left out with a warning, since reading it executes
    code; functions, such as a scheduler's formula, without one.

    Args:
        checkpoint (dict): As mmengine saves it; changed in place.
    """
    weights = checkpoint.get('state_dict')
    for key in list(checkpoint):
        if checkpoint[key] is weights:
            continue
        try:
            checkpoint[key] = _plain(checkpoint[key], key)
        except _NotPlain as error:
            _left_out(key, error)
            del checkpoint[key]
    if isinstance(weights, dict):
        # In place, since mmengine adds versions as an attribute.
        for key, value in list(weights.items()):
            if not isinstance(value, Tensor):
                try:
                    weights[key] = _plain(value, f'state_dict.{key}')
                except _NotPlain as error:
                    _left_out(f'state_dict.{key}', error)
                    del weights[key]


def restore_histories(checkpoint: Mapping[str, Any]) -> None:
    """Put the histories of logged scalars together again.

    Args:
        checkpoint (dict): As read; other checkpoints stay as they are.
    """
    hub = checkpoint.get('message_hub')
    scalars = hub.get('log_scalars') if isinstance(hub, Mapping) else None
    if not isinstance(scalars, dict):
        return
    for key, value in scalars.items():
        if isinstance(value, Mapping) and _HISTORY in value:
            values, counts = value[_HISTORY]
            history = HistoryBuffer(max_length=value['max_length'])
            history._log_history = values.cpu().numpy()
            history._count_history = counts.cpu().numpy()
            scalars[key] = history


def _plain(value: Any, where: str) -> Any:
    if type(value) in _AS_THEY_ARE or isinstance(value, Tensor):
        return value
    if isinstance(value, HistoryBuffer):
        return {_HISTORY: tuple(torch.from_numpy(one.copy())
                                for one in value.data),
                'max_length': value.max_length}
    # numpy's float64 is a float as well, and its str_ a str.
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where)
    if isinstance(value, Mapping):
        return _plain_dict(value, where)
    if isinstance(value, (list, tuple)):
        items = [_plain(one, where) for one in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (set, frozenset)):
        return {_plain(one, where) for one in value}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    raise _NotPlain(value)


def _plain_dict(value: Mapping, where: str) -> dict:
    found: dict = OrderedDict() if isinstance(value, OrderedDict) else {}
    for key, one in value.items():
        try:
            found[_plain(key, where)] = _plain(one, f'{where}.{key}')
        except _NotPlain as error:
            _left_out(f'{where}.{key}', error)
    return found


def _left_out(where: str, error: _NotPlain) -> None:
    value = error.args[0]
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)):
        return
    print_log(
        f'checkpoint: {where} is a {type(value).__name__}, which '
        'torch.load(weights_only=True) refuses; it is not saved.',
        logger='current', level=logging.WARNING)
