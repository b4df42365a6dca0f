"""The command contrast: kernel, class statistics and growth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from mmseg_contrast import ops

from .arguments import add_common, add_sizes, read_sizes
from .class_statistics import (
    MOMENTS,
    make_pixels,
    measure_moments,
    moments_table,
)
from .kernel import (
    LIBRARY,
    LOSSES,
    OURS,
    Sizes,
    growth_table,
    has_library,
    kernel_table,
    make_problem,
    measure_growth,
    measure_kernel,
    with_gradients,
)
from .memory import peak_above
from .report import (
    circumstances,
    in_words,
    judge,
    mebibytes,
    table_of_targets,
    write_json,
)
from .timing import Timer, forbid_waiting

#: Largest shares of the dense form's time and peak memory.
TARGETS = dict(cpu=(0.7, 0.25), cuda=(0.35, 0.1))
#: How many times faster than the form of size N x C x D.
MOMENTS_TARGET = 200


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'contrast', help='kernel, class statistics and growth')
    parser.set_defaults(run=run_contrast)
    parser.add_argument(
        '--no-memory', action='store_true', help='do not measure memory')
    add_sizes(parser, Sizes)
    add_common(parser)


def check_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at and what was reached.

    The kernel's rows are those of our own forms, relative to the dense one.

    Args:
        result (dict): With ``kernel``, ``moments`` and ``device``.
    """
    time_target, peak_target = TARGETS[result['device']]
    found = []
    for row in result['kernel']:
        if row['name'] not in OURS:
            continue
        what = f'{row["name"]}, own = {row["own"]}, {row["keys"]} keys'
        found.append(dict(
            what=f'{what}: time', reached=row['time_ratio']['median'],
            target=time_target, most=True))
        if row['peak_ratio'] is not None:
            found.append(dict(what=f'{what}: peak memory', most=True,
                              reached=row['peak_ratio'], target=peak_target))
    found.append(dict(
        what='class statistics: times faster', most=False,
        reached=result['moments'][-1]['times_faster']['median'],
        target=MOMENTS_TARGET))
    judge(found)
    return found


def check_syncs(sizes: Sizes) -> None:
    """Run our forms and statistics by :func:`forbid_waiting`."""
    features, labels = make_pixels(sizes, 'cuda')
    problems = [make_problem(sizes, live, 'cuda') for live in (False, True)]
    forbid_waiting([
        partial(ops.class_moments, features, labels, sizes.classes),
        *(partial(with_gradients, loss, problem, own)
          for problem in problems for loss in OURS.values()
          for own in ('positive', 'energy'))])


def run_contrast(args: argparse.Namespace) -> None:
    """Kernel, class statistics and growth."""
    sizes = read_sizes(args.sizes, Sizes)
    if args.sync_check:
        check_syncs(sizes)
        print('No part waits for the GPU.')
    memory = not args.no_memory
    timer = Timer(args.device, args.repeats, args.clock)
    result = dict(circumstances(timer, LIBRARY), sizes=asdict(sizes))
    if not has_library():
        print(f'{LIBRARY} cannot be imported: its rows are left out.')
    keys = sizes.classes * sizes.length
    print(f'\n{sizes.anchors} anchors, {keys} keys, {sizes.channels} '
          f'channels, tau {sizes.tau:g}; {in_words(result)}\n', flush=True)
    result['kernel'] = measure_kernel(sizes, timer, memory)
    print(kernel_table(result['kernel']), flush=True)
    result['moments'] = measure_moments(sizes, timer, memory)
    print(f'\nClass statistics, {sizes.classes} classes, '
          f'{sizes.moment_channels} channels; the features are '
          f'{mebibytes(result["moments"][0]["features"])} MiB\n')
    if result['moments'][0]['pixels'] < sizes.pixels:
        print(f'{sizes.pixels} pixels x C x D do not fit into the memory.\n')
    print(moments_table(result['moments']), flush=True)
    result['growth'] = measure_growth(sizes, timer)
    print('\nGrowth of the class form\n\n' + growth_table(result['growth']))
    result['targets'] = check_targets(result)
    print('\n' + table_of_targets(result['targets']))
    write_json(args.json, result)


def peak_of(case: dict[str, Any]) -> int:
    """Peak bytes of one row of a table, above its inputs.

    Args:
        case (dict): Part, sizes, device and name.
    """
    sizes, device = Sizes(**case['sizes']), case['device']
    tiny = replace(sizes, anchors=2, length=2, pixels=2)

    def work(sizes: Sizes) -> Callable[[], Any]:
        if case['part'] == 'kernel':
            loss = LOSSES[case['name']]
            problem = make_problem(sizes, case['live'], device)
            return partial(with_gradients, loss, problem, case['own'])
        return partial(MOMENTS[case['name']], *make_pixels(sizes, device),
                       sizes.classes)

    work(tiny)()  # code and threads are there before memory is counted
    return peak_above(work(sizes), device)
