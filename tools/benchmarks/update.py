"""The command update: what follows a backward, as others do it and as we do.

The student's optimizer and the teacher's average touch each weight once: what
they cost beyond that is the number of operations they are split into.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from mmengine.config import ConfigDict, DictAction
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmseg_contrast.ops import ema_update

from .arguments import add_common
from .draws import generator
from .report import circumstances, in_words, table, write_json
from .timing import Spread, Timer, forbid_waiting, ratios
from .training import RATE, Setup, Training, optim_config

#: Of the teacher.
ALPHA = 0.999


def one_by_one(teacher: list[torch.Tensor], student: list[torch.Tensor]
               ) -> None:
    """The average's equation, tensor by tensor."""
    with torch.no_grad():
        for mine, theirs in zip(teacher, student, strict=True):
            mine.copy_(ALPHA * mine + (1 - ALPHA) * theirs)


def optimizers(model: nn.Module, options: ConfigDict
               ) -> dict[str, OptimWrapper]:
    """Stock constructor and ours, on the same student.

    Args:
        model (nn.Module): With ``segmentor``.
        options (ConfigDict): ``optim_wrapper`` of a config.
    """
    ours = optim_config(options, 'float32')
    stock = {key: value for key, value in ours.items()
             if key not in ('constructor', 'fused')}
    made = {
        'a group for each tensor': build_optim_wrapper(
            model.segmentor, stock),
        'groups merged': build_optim_wrapper(model, dict(ours, fused=False)),
        'groups merged, fused': build_optim_wrapper(
            model, dict(ours, fused=True))}
    for wrapper in made.values():
        for group in wrapper.optimizer.param_groups:
            group['lr'] = RATE
    return made


def measure(setup: Setup, timer: Timer, sync_check: bool) -> dict[str, Any]:
    """All forms, in turns.

    Args:
        setup (Setup): Whose weights.
        timer (Timer): How it is measured.
        sync_check (bool): Whether waiting for a GPU is an error first.
    """
    model = Training(setup).model
    draw = generator()
    for one in model.parameters():
        if one.requires_grad:
            one.grad = torch.randn(one.shape, generator=draw).to(one.device)
    teacher, student = (list(net.parameters()) for net in (
        next(iter(model.teachers.values())).model, model.segmentor))
    works: dict[tuple[str, str], Callable[[], Any]] = {
        ("teacher's average", 'tensor by tensor'): partial(
            one_by_one, teacher, student),
        ("teacher's average", 'foreach'): partial(
            ema_update, teacher, student, ALPHA)}
    made = optimizers(model, setup.read().optim_wrapper)
    for name, wrapper in made.items():
        kind = type(wrapper.optimizer).__name__
        works[f"student's {kind}", name] = wrapper.optimizer.step
    if sync_check:
        for work in works.values():
            work()  # the first step makes buffers
        forbid_waiting(works.values())
    seconds = timer.in_turns(works)
    first: dict[str, list[float]] = {}
    rows = []
    for (what, form), mine in seconds.items():
        groups = made[form].optimizer.param_groups if form in made else []
        rows.append(dict(
            what=what, form=form, groups=len(groups) or None,
            seconds=asdict(Spread.of(mine)),
            ratio=asdict(ratios(mine, first.setdefault(what, mine)))))
    return dict(config=setup.config, tensors=len(student), rows=rows,
                weights=sum(one.numel() for one in student))


def as_table(result: dict[str, Any]) -> str:
    """Of :func:`measure`."""
    return table(
        ('what', 'form', 'groups', 'ms', 'of the first'),
        [(row['what'], row['form'], str(row['groups'] or '-'),
          Spread(**row['seconds']).text(1e3, 1), Spread(**row['ratio']).text())
         for row in result['rows']])


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'update', help="optimizer and teacher's average, before and after")
    parser.set_defaults(run=run_update)
    parser.add_argument('--config', required=True, help='of adaptation')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        default={}, help='as of tools/train.py')
    add_common(parser)


def run_update(args: argparse.Namespace) -> None:
    """One table."""
    timer = Timer(args.device, args.repeats, args.clock)
    setup = Setup(args.config, args.cfg_options, device=args.device)
    result = dict(circumstances(timer, 'mmengine', 'onedl-mmengine'),
                  **measure(setup, timer, args.sync_check))
    print(f'\n{args.config}: {result["tensors"]} tensors, '
          f'{result["weights"] / 1e6:.1f} M weights; {in_words(result)}\n\n'
          f'{as_table(result)}', flush=True)
    write_json(args.json, result)
