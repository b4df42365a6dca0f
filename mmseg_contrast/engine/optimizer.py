"""Build the optimizer of a UDA model as that of the plain student."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MMLogger, print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

#: What constructors note in a group and no optimizer reads.
LABELS = ('lr_mult', 'decay_mult')
#: How a step is computed, not what.
FORMS = ('fused', 'foreach', 'capturable', 'differentiable')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class UDAOptimWrapperConstructor:
    """Apply a stock constructor to the student, add what else is trainable.

    The stock constructor sees ``model.segmentor``, so ``custom_keys`` and
    layer decay find the names of the plain config (``backbone.*``). Trainable
    parameters of objectives, views and the like follow with the base learning
    rate and weight decay, times those of the first of ``custom_keys``, the
    longest first, that is part of their name, ``objectives.cluda.weighter``
    for example; teachers and frozen parameters get into no group.
    Groups with equal hyper-parameters are merged: stock constructors make one
    group per tensor, which defeats the foreach and fused optimizers. A model
    without ``segmentor`` is treated as the student itself.

    Args:
        optim_wrapper_cfg (dict): As for any constructor, with two more keys.
            ``base_constructor`` names the stock constructor to apply; default
            ``'DefaultOptimWrapperConstructor'``. ``fused`` says whether the
            optimizer updates all tensors in one kernel: True, False, or
            'auto', which does so where it can, if all that is trained is on
            GPUs. A resumed run does as its own config says. An ``optimizer``
            that says ``fused`` or ``foreach`` itself is left alone.
        paramwise_cfg (dict, optional): Passed to the stock constructor.

    Raises:
        ValueError: If the student has nothing to train, or ``fused`` is none
            of the three or not possible.
    """

    def __init__(self,
                 optim_wrapper_cfg: dict,
                 paramwise_cfg: dict | None = None) -> None:
        cfg = copy.deepcopy(optim_wrapper_cfg)
        self.fused = cfg.pop('fused', 'auto')
        if self.fused not in (True, False, 'auto'):
            raise ValueError("optim_wrapper.fused must be True, False or "
                             f"'auto', got {self.fused!r}.")
        base = cfg.pop('base_constructor', 'DefaultOptimWrapperConstructor')
        self.custom_keys = dict((paramwise_cfg or {}).get('custom_keys', {}))
        self.base = dict(
            type=base,
            optim_wrapper_cfg=cfg,
            # Layer decay renames keys of this dict in place.
            paramwise_cfg=copy.deepcopy(paramwise_cfg))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper.

        Args:
            model (nn.Module): A ``UDASegmentor`` or a plain segmentor, in a
                distributed wrapper or not.

        Returns:
            OptimWrapper: The wrapper, with merged parameter groups.
        """
        if is_model_wrapper(model):
            model = model.module
        student = getattr(model, 'segmentor', model)
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError(
                'model.segmentor has no trainable parameter: unfreeze a part '
                'of it (frozen_stages, frozen_exclude, ...).')

        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer_cfg = self.base['optim_wrapper_cfg']['optimizer']
        if use_fused(self.fused, optimizer_cfg, trained):
            optimizer_cfg['fused'] = True
        base = OPTIM_WRAPPER_CONSTRUCTORS.build(self.base)
        # The table below says in a few lines what stock constructors say in
        # three for each tensor.
        with _without_lines('paramwise_options',
                            'is skipped since its requires_grad'):
            optim_wrapper = base(student)
        optimizer = optim_wrapper.optimizer
        drop_frozen(optimizer)
        add_parameters(optimizer, trainable_extras(model, student),
                       self.custom_keys)
        merge_groups(optimizer)
        start_momentum(optimizer)
        resume_as_built(optimizer)
        print_log(describe_groups(optimizer), logger='current')
        return optim_wrapper


def use_fused(asked: bool | str, optimizer_cfg: Mapping,
              trained: Sequence[Tensor]) -> bool:
    """Whether to build the optimizer with ``fused=True``.

    Args:
        asked (bool or str): True, False or 'auto'.
        optimizer_cfg (Mapping): The optimizer's config.
        trained (Sequence[Tensor]): What will be trained.

    Raises:
        ValueError: If it is asked for and the optimizer has no such form.
    """
    if not asked or {'fused', 'foreach'} & set(optimizer_cfg):
        return False
    kind = optimizer_cfg['type']
    cls = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    known = cls is not None and 'fused' in inspect.signature(cls).parameters
    if asked == 'auto':
        # With dampening, :func:`start_momentum` can't make the first step of
        # SGD one that can be left out.
        return known and not optimizer_cfg.get('dampening') and all(
            p.is_cuda and p.is_floating_point() for p in trained)
    if not known:
        raise ValueError('optim_wrapper.fused = True, but optim_wrapper.'
                         f'optimizer.type = {kind!r} has no fused form.')
    return True


@contextmanager
def _without_lines(*texts: str) -> Iterator[None]:
    """Keep log lines that contain one of the texts out of the log."""
    def kept(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    logger = MMLogger.get_current_instance()
    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


def trainable_extras(model: nn.Module,
                     student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters outside student and teachers.

    Args:
        model (nn.Module): The whole model.
        student (nn.Module): Its student.

    Returns:
        list: ``(name, parameter)`` in the model's order.
    """
    # By identity: an objective may hold a reference to a part of the student.
    known = {id(p) for p in student.parameters()}
    teachers = getattr(model, 'teachers', None)
    if isinstance(teachers, nn.Module):
        known.update(id(p) for p in teachers.parameters())
    return [(name, p) for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in known]


def drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Take parameters without gradient, and empty groups, out of it."""
    for group in optimizer.param_groups:
        keep = [p.requires_grad for p in group['params']]
        for key in ('params', 'param_names'):
            if key in group:
                group[key] = [
                    value for value, kept in zip(group[key], keep, strict=True)
                    if kept
                ]
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if group['params']
    ]


def add_parameters(optimizer: torch.optim.Optimizer,
                   named: list[tuple[str, nn.Parameter]],
                   custom_keys: Mapping[str, Mapping] | None = None) -> None:
    """Add a group for each parameter, with the optimizer's base settings.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer, changed in place.
        named (list): Parameters with their names.
        custom_keys (Mapping, optional): As in ``paramwise_cfg``; of each key
            ``lr_mult`` and ``decay_mult`` count.
    """
    # The order in which stock constructors look for a key in a name.
    keys = sorted(sorted(custom_keys or {}), key=len, reverse=True)
    for name, parameter in named:
        group: dict[str, Any] = dict(params=[parameter])
        own = next(((custom_keys or {})[key] for key in keys if key in name),
                   {})
        for setting, factor in (('lr', 'lr_mult'),
                                ('weight_decay', 'decay_mult')):
            base = optimizer.defaults.get(setting)
            if factor in own and base is not None:
                group[setting] = base * own[factor]
        # torch wants names in every group or in none; layer decay gives them.
        if 'param_names' in optimizer.param_groups[0]:
            group['param_names'] = [name]
        optimizer.add_param_group(group)


def merge_groups(optimizer: torch.optim.Optimizer) -> None:
    """Merge groups with equal hyper-parameters, in place, order kept.

    Args:
        optimizer (torch.optim.Optimizer): One that hasn't stepped yet.

    Raises:
        ValueError: If it holds state already, whose order would be lost.
    """
    if optimizer.state:
        raise ValueError(
            'Parameter groups are merged before the first step only: this '
            'optimizer has state already.')
    merged: dict[tuple, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        key = tuple(
            (name, _comparable(value)) for name, value in sorted(group.items())
            if name not in ('params', 'param_names', *LABELS))
        first = merged.setdefault(key, group)
        if first is group:
            continue
        first['params'].extend(group['params'])
        if 'param_names' in first:
            first['param_names'].extend(group['param_names'])
        for label in LABELS:
            if first.get(label) != group.get(label):
                first.pop(label, None)
    optimizer.param_groups[:] = merged.values()


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD a momentum of 0 before its first step.

    It would make an uninitialised one in that step, and keep it if the step
    is left out because a gradient is not finite. From 0 the first momentum is
    the gradient, as ever.

    Args:
        optimizer (torch.optim.Optimizer): One that hasn't stepped yet.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group.get('fused') and group['momentum'] and (
                not group['dampening']):
            for p in group['params']:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def resume_as_built(optimizer: torch.optim.Optimizer) -> None:
    """Let a checkpoint say what is known, not how steps are computed.

    PyTorch takes over all settings of the groups, and the memory layout of
    what is averaged: a run that was begun on a CPU could not go on with a
    fused optimizer, nor one whose weights are ``channels_last`` since.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer, which gets hooks.
    """
    def keep_forms(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
        groups = [{**theirs, **{key: mine[key] for key in FORMS
                                if key in mine}}
                  for theirs, mine in zip(saved['param_groups'],
                                          optimizer.param_groups,
                                          strict=False)]
        # Where their number differs, PyTorch says so.
        groups += saved['param_groups'][len(groups):]
        return dict(saved, param_groups=groups)

    def lay_out(optimizer: torch.optim.Optimizer) -> None:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and (
                        value.stride() != p.stride()):
                    state[key] = torch.empty_like(
                        p, dtype=value.dtype).copy_(value)

    optimizer.register_load_state_dict_pre_hook(keep_forms)
    optimizer.register_load_state_dict_post_hook(lay_out)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """A table of the groups: learning rate, weight decay, sizes."""
    rows = [f'{"lr":>10} {"decay":>10} {"tensors":>8} {"parameters":>12}']
    for group in optimizer.param_groups:
        lr = float(group['lr']) if 'lr' in group else float('nan')
        decay = float(group.get('weight_decay', 0.))
        size = sum(p.numel() for p in group['params'])
        rows.append(f'{lr:>10.4g} {decay:>10.4g} {len(group["params"]):>8} '
                    f'{size:>12,}')
    return '\n'.join(['Parameter groups:', *rows])


def _comparable(value: Any) -> Any:
    """A hashable stand-in that is equal exactly if the setting is."""
    if isinstance(value, Tensor):
        return ('tensor', id(value))
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(item) for item in value)
    return value


def refuse_layer_decay_on_wrapper(cfg: Mapping, model: nn.Module) -> None:
    """Stock layer decay finds no layer behind the student's prefix.

    It would train with one rate for all layers, and say nothing.

    Args:
        cfg (Mapping): Config of the run.
        model (nn.Module): The model, wrapped or not.

    Raises:
        ValueError: If the config combines the two.
    """
    if is_model_wrapper(model):
        model = model.module
    constructor = str((cfg.get('optim_wrapper') or {}).get('constructor', ''))
    if hasattr(model, 'segmentor') and 'Decay' in constructor:
        raise ValueError(
            f"optim_wrapper.constructor = '{constructor}' does not find the "
            "student's layers: set constructor='UDAOptimWrapperConstructor' "
            f"and base_constructor='{constructor}'.")
