"""Finds what would wait for a GPU, or fail on one, on the CPU."""

import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
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
#: What makes a tensor of numbers that the host has.
FROM_HOST = (torch.tensor, torch.as_tensor, torch.scalar_tensor)


class SyncWatch(TorchDispatchMode):
    """Notes where the host reads what would be computed on a GPU.

    Some tensors are said to be on the device; what is computed from them, or
    made with their ``device``, is as well. Draws on the host may be read,
    and go to the device by ``to(..., non_blocking=True)``.

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

    def on_host(self, value):
        return isinstance(value, Tensor) and not self.watches(value)

    def note(self, what):
        frames = [frame for frame in traceback.extract_stack()
                  if {'mmseg_contrast', 'mmseg', 'mmengine', 'mmcv'} & set(
                      Path(frame.filename).parts)]
        place = f'{frames[-1].filename}:{frames[-1].lineno}' if frames else ''
        self.found.append(f'{what} at {place}')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs))
                   if isinstance(one, Tensor)]
        watched = any(self.watches(one) for one in tensors)
        if watched:
            self.check(func._schema.name, args, kwargs, tensors)
        results = func(*args, **kwargs)
        if watched:
            for one in tree_leaves(results):
                if isinstance(one, Tensor):
                    self.mark(one)
        return results

    def check(self, name, args, kwargs, tensors):
        """Note an operator that waits, or that would fail on a GPU."""
        indices = [one for one in tree_leaves(args[1:2])
                   if isinstance(one, Tensor)] if name in INDEXING else []
        if name in WAITING or any(
                one.dtype in (torch.bool, torch.uint8) for one in indices):
            self.note(name)
        elif name == 'aten::repeat_interleave' and (
                kwargs.get('output_size') is None):
            self.note(name)
        elif any(self.on_host(one) for one in indices):
            self.note(f'{name} with indices from the host')
        elif name == 'aten::copy_':
            blocking = not (args[2:] or [kwargs.get('non_blocking')])[0]
            if self.watches(args[0]) and self.on_host(args[1]) and blocking:
                self.note('a blocking copy to the device')
        elif any(self.on_host(one) and one.dim() for one in tensors):
            self.note(f'{name} of host and device')


class _Moves(TorchFunctionMode):
    """Follows tensors to the device, and those that are made there."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.to and not self.watch.watches(args[0]):
            return self.move(func, args, kwargs)
        if func is Tensor.new_tensor and self.watch.watches(args[0]):
            self.watch.note('new_tensor')
        result = func(*args, **kwargs)
        if isinstance(kwargs.get('device'), torch.device) and (
                'generator' not in kwargs):
            if func in FROM_HOST:
                self.watch.note(func.__name__)
            for one in tree_leaves(result):
                if isinstance(one, Tensor):
                    self.watch.mark(one)
        return result

    def move(self, func, args, kwargs):
        targets = [one for one in (*args[1:], *kwargs.values()) if isinstance(
            one, torch.device) or self.watch.watches(one)]
        result = func(*args, **kwargs)
        if not targets:
            return result
        if not kwargs.get('non_blocking'):
            self.watch.note('a blocking to()')
        result = result.clone()  # here it has not moved
        self.watch.mark(result)
        return result


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

    with ExitStack() as stack:
        for name in READING:
            setattr(Tensor, name, replace(name))
            stack.callback(setattr, Tensor, name, stock[name])
        stack.enter_context(_Moves(watch))
        stack.enter_context(watch)
        yield watch
