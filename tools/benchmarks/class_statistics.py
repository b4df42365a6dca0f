"""Mean and variance of each class, and the form with large tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmseg_contrast import ops

from .draws import generator
from .kernel import Sizes, difference
from .memory import available_memory, peak_in_new_process
from .report import mebibytes, table
from .timing import Spread, Timer, ratios


def expanded_moments(features: Tensor, labels: Tensor, num_classes: int
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """With tensors of size N x C x D, as SDCA's and SePiCo's code does."""
    shape = (len(features), num_classes, features.shape[1])
    member = (labels.unsqueeze(1) == torch.arange(
        num_classes, device=labels.device)).to(features.dtype)
    member = member.unsqueeze(2).expand(shape)
    sorted_features = features.unsqueeze(1).expand(shape) * member
    count = member.sum(0)
    mean = sorted_features.sum(0) / count.clamp_min(1)
    apart = sorted_features - mean.expand(shape) * member
    return count[:, 0], mean, apart.pow(2).mul(member).sum(0)


MOMENTS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    'N x C x D': expanded_moments,
    'ours': ops.class_moments,
}


def make_pixels(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Features of pixels and their labels, one in twenty ignored."""
    draw = generator()
    features = torch.randn(
        sizes.pixels, sizes.moment_channels, generator=draw)
    labels = torch.randint(
        0, sizes.classes, (sizes.pixels, ), generator=draw)
    labels[::20] = 255
    return features.to(device), labels.to(device)


def expanded_bytes(sizes: Sizes) -> int:
    """What :func:`expanded_moments` needs, with a margin."""
    return 5 * 4 * sizes.pixels * sizes.classes * sizes.moment_channels


def measure_moments(sizes: Sizes, timer: Timer, memory: bool
                    ) -> list[dict[str, Any]]:
    """Time, memory and result of both ways to get class statistics.

    Returns:
        list[dict]: Two rows; ``times_faster`` is relative to the form of
        size N x C x D. ``pixels`` is less than asked for where that form
        does not fit into the memory.
    """
    while sizes.pixels > 1 and expanded_bytes(sizes) > available_memory(
            timer.device):
        sizes = replace(sizes, pixels=sizes.pixels // 2)
    features, labels = make_pixels(sizes, timer.device)
    results = {name: function(features, labels, sizes.classes)
               for name, function in MOMENTS.items()}
    error = difference(*([one.double() for one in results[name]]
                         for name in ('ours', 'N x C x D')))
    seconds = timer.in_turns({
        name: partial(function, features, labels, sizes.classes)
        for name, function in MOMENTS.items()})
    case = dict(part='moments', device=timer.device, sizes=asdict(sizes))
    return [dict(
        name=name, pixels=sizes.pixels,
        seconds=asdict(Spread.of(seconds[name])),
        times_faster=asdict(ratios(seconds['N x C x D'], seconds[name])),
        peak=peak_in_new_process(dict(case, name=name)) if memory else None,
        features=features.nbytes, difference=error if name == 'ours' else 0.)
        for name in MOMENTS]


def moments_table(rows: list[dict[str, Any]]) -> str:
    """Of :func:`measure_moments`."""
    return table(
        ('computed by', 'pixels', 'ms', 'times faster', 'peak MiB',
         'difference'),
        [(row['name'], str(row['pixels']),
          Spread(**row['seconds']).text(1e3, 1),
          Spread(**row['times_faster']).text(digits=0),
          mebibytes(row['peak']), f'{row["difference"]:.0e}')
         for row in rows])
