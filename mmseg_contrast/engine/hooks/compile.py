"""torch.compile for the parts of an iteration that are pure tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn

from ...models.classifier_input import prepare_to_see

PARTS = ('backbone', 'neck', 'decode_head')
#: Forms of one function: student and teacher, training and not, sizes.
FORMS = 64


def segmentors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Student, teachers and frozen networks, with their names.

    Args:
        model (nn.Module): A ``UDASegmentor`` or a plain segmentor, unwrapped.

    Yields:
        tuple: Name, and a module with the parts of a segmentor.
    """
    yield 'segmentor', getattr(model, 'segmentor', model)
    for name, teacher in getattr(model, 'teachers', {}).items():
        if isinstance(getattr(teacher, 'model', None), nn.Module):
            yield f'teachers.{name}', teacher.model
    for name, objective in getattr(model, 'objectives', {}).items():
        if isinstance(getattr(objective, 'encoder', None), nn.Module):
            yield f'objectives.{name}', nn.ModuleDict(
                dict(backbone=objective.encoder))


def callables(part: nn.Module) -> list[nn.Module]:
    """The modules in a part that are called, and return tensors alone.

    Args:
        part (nn.Module): A backbone, neck or decode head, or a list of heads.
    """
    if isinstance(part, nn.ModuleList):
        return [one for head in part for one in callables(head)]
    if hasattr(part, 'scales'):  # HRDAHead: boxes and windows stay outside
        attention = getattr(part, 'scale_attention', None)
        return [part.head, *([] if attention is None else [attention])]
    return [part]


@HOOKS.register_module()
class CompileHook(Hook):
    """Compiles backbones and decode heads of student and teachers in place.

    mmengine's ``compile = True`` compiles ``train_step`` as a whole, which an
    iteration of adaptation is no good case for: its graph breaks at each
    draw, hook and pseudo-label. Here the networks alone are compiled. Names
    and values of weights, and checkpoints, are the same. Outputs are equal up
    to rounding; dropout and stochastic depth inside of them draw otherwise
    than uncompiled (but the same again after a resume). Validation runs
    uncompiled, so that images of any size need no compilation.

    Heads of plain segmentors are not compiled: mmseg asks them for their loss
    by ``forward()``.

    Args:
        parts (Sequence[str]): Out of 'backbone', 'neck' and 'decode_head'.
        teachers (bool): Whether teachers and frozen networks are, too.
        backend (str or Callable): See torch.compile.
        mode (str, optional): See there.
        dynamic (bool, optional): See there. Training crops have one size.

    Raises:
        ValueError: If a part is unknown, or torch can't compile in place.
    """

    def __init__(self,
                 parts: Sequence[str] = ('backbone', 'decode_head'),
                 teachers: bool = True,
                 backend: str | Callable = 'inductor',
                 mode: str | None = None,
                 dynamic: bool | None = False) -> None:
        wrong = [parts] if isinstance(parts, str) else [
            part for part in parts if part not in PARTS]
        if wrong or not parts:
            raise ValueError(f'CompileHook.parts in custom_hooks must be a '
                             f'list out of {PARTS}, got {parts!r}.')
        if not hasattr(nn.Module, 'compile'):
            raise ValueError('CompileHook in custom_hooks needs a torch whose '
                             'modules have compile(), 2.2 or later.')
        self.parts = parts
        self.teachers = teachers
        self.options = dict(backend=backend, mode=mode, dynamic=dynamic)
        self._compiled: list[tuple[nn.Module, Any]] = []

    def before_train(self, runner: Runner) -> None:
        """Compile; the work is done when each part first runs.

        Args:
            runner (Runner): The runner, its checkpoint loaded.

        Raises:
            ValueError: If the model has none of the parts.
        """
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        names = []
        for name, net in segmentors(model):
            if name != 'segmentor' and not self.teachers:
                continue
            for key in self.parts:
                if hasattr(net, key):
                    names.append(f'{name}.{key}')
                    self._compile(getattr(net, key))
        if not names:
            raise ValueError('CompileHook in custom_hooks: '
                             f'{type(model).__name__} has no {self.parts}.')
        limit = ('recompile_limit' if hasattr(
            torch._dynamo.config, 'recompile_limit') else 'cache_size_limit')
        setattr(torch._dynamo.config, limit, max(
            FORMS, getattr(torch._dynamo.config, limit)))
        print_log(f'Compiled when first run: {", ".join(names)}',
                  logger='current')

    def _compile(self, part: nn.Module) -> None:
        for module in callables(part):
            # Hooks that are set later would not be noticed.
            prepare_to_see(module)
            module.compile(**self.options)
            self._compiled.append((module, module._compiled_call_impl))

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Let CUDA graphs keep outputs until the next iteration.

        With mode='reduce-overhead' a network's call would free those of its
        last one otherwise, unless a backward is still to come: the teacher's
        pass those of a student that has been backpropagated.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the iteration.
            data_batch (dict, optional): What the loader gave.
        """
        torch.compiler.cudagraph_mark_step_begin()

    def before_val(self, runner: Runner) -> None:
        """Run the networks uncompiled.

        Args:
            runner (Runner): The runner.
        """
        for module, _ in self._compiled:
            module._compiled_call_impl = None

    def after_val(self, runner: Runner) -> None:
        """Run them compiled again.

        Args:
            runner (Runner): The runner.
        """
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled
