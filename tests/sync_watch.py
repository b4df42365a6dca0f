"""Finds what would wait for a GPU, on the CPU."""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators whose result's size, or number, the host has to know.
WAITING = {
    'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select',
    'aten::_unique2', 'aten::unique_dim', 'aten::unique_consecutive',
    'aten::unique_dim_consecutive', 'aten::bincount', 'aten::equal',
    'aten::is_nonzero', 'aten::nonzero_numpy'}
INDEXING = {'aten::index', 'aten::index_put', 'aten::index_put_',
            'aten::_index_put_impl_', 'aten::_unsafe_index'}
#: Methods that read memory without an operator.
READING = ('tolist', 'numpy', '__array__', 'cpu')


class SyncWatch(TorchDispatchMode):
    """Notes where the host reads what would be computed on a GPU.

    Some tensors are said to be on the device; what is computed from them is
    as well. Draws on the host may be read.

    Args:
        tensors: Tensors on the device.
    """

    def __init__(self, tensors):
        super().__init__()
        self.found = []
        # Kept alive: the address of a freed one would be used again.
        self.storages = {}
        for tensor in tensors:
            self.mark(tensor)

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def watches(self, value):
        return (isinstance(value, Tensor)
                and value.untyped_storage()._cdata in self.storages)

    def note(self, what):
        frames = [frame for frame in traceback.extract_stack()
                  if 'mmseg_contrast' in frame.filename
                  or 'mmseg' in Path(frame.filename).parts
                  or 'mmengine' in Path(frame.filename).parts]
        place = f'{frames[-1].filename}:{frames[-1].lineno}' if frames else ''
        self.found.append(f'{what} at {place}')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs))
                   if isinstance(one, Tensor)]
        watched = any(self.watches(one) for one in tensors)
        name = func._schema.name
        if watched and (name in WAITING or name in INDEXING and any(
                one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(
                    args[1]) if isinstance(one, Tensor))):
            self.note(name)
        if watched and name == 'aten::repeat_interleave' and (
                (kwargs or {}).get('output_size') is None):
            self.note(name)
        results = func(*args, **(kwargs or {}))
        if watched:
            for one in tree_leaves(results):
                if isinstance(one, Tensor):
                    self.mark(one)
        return results


@contextmanager
def watch_syncs(*tensors):
    """A SyncWatch that also sees what reads memory directly."""
    watch = SyncWatch(tensors)
    stock = {name: getattr(Tensor, name) for name in READING}

    def replace(name):
        def reading(self, *args, **kwargs):
            if watch.watches(self):
                watch.note(name)
            return stock[name](self, *args, **kwargs)
        return reading

    try:
        for name in READING:
            setattr(Tensor, name, replace(name))
        with watch:
            yield watch
    finally:
        for name, method in stock.items():
            setattr(Tensor, name, method)
