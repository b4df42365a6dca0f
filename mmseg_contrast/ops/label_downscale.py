"""Label maps at the resolution of a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contrast import check_choice
from .labels import IGNORE, ignored_last

RULES = ('nearest', 'centre', 'ratio', 'majority', 'stride')


def labels_at(labels: Tensor,
              size: Sequence[int],
              rule: str,
              num_classes: int,
              min_ratio: float = 0.75,
              ignore_index: int = IGNORE) -> Tensor:
    """Labels at the positions of a feature map.

    Rules:

    - ``nearest``: row ``floor(i H / h)``, column ``floor(j W / w)``, as
      torch's nearest resizing; for any size. Of classes at a border it
      keeps what the grid hits.
    - ``centre``: row ``floor((i + 1/2) H / h)``, the pixel in the middle of
      the cell, as torch's 'nearest-exact'; for any size. With features that
      were resized with ``align_corners=False``, as
      :func:`mmseg_contrast.ops.bilinear_at` does at
      :func:`mmseg_contrast.ops.centres`, it is the label of their place.
    - ``ratio``: the most frequent label of each cell if it covers at least
      ``min_ratio`` of it, else ignored (DAFormer, Hoyer et al., CVPR 2022;
      SePiCo, Xie et al., 2023), see :func:`downscale_labels`.
    - ``majority``: the most frequent label of each cell, ignored where
      ignored pixels are the most.
    - ``stride``: each s-th row and column from the first on,
      ``labels[::s]`` (Hu et al., MICCAI 2021); rows and columns may differ
      in s. Where sizes divide it equals ``nearest``; it also knows the
      ``ceil(H / s)`` rows of a strided convolution, as 129 of 513.

    Ids outside ``[0, num_classes)`` are ignored: ``ratio`` and ``majority``
    return them as ``ignore_index``, the others as they are. No rule
    interpolates, which would invent classes. No host sync.

    Args:
        labels (Tensor): Class ids, int64, ``(B, H, W)``.
        size (Sequence[int]): ``(h, w)`` of the feature map.
        rule (str): 'nearest', 'centre', 'ratio', 'majority' or 'stride'.
        num_classes (int): Number of classes C.
        min_ratio (float): For ``ratio``, in [0, 1].
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: int64, ``(B, h, w)``.

    Raises:
        ValueError: If the rule is none of these, if the ratio is out of
            range, or if the rule cannot map labels of this size.
    """
    check_choice('label_downscale.rule', rule, RULES)
    if not 0 <= min_ratio <= 1:
        raise ValueError(f'label_downscale.min_ratio = {min_ratio} must be '
                         'in [0, 1]')
    height, width = labels.shape[1:]
    rows, columns = size
    if rule in ('nearest', 'centre'):
        for dim, number in ((1, rows), (2, columns)):
            labels = labels.index_select(dim, _hit(
                labels.shape[dim], number, rule == 'centre', labels.device))
        return labels
    if rule == 'stride':
        down, right = -(-height // rows), -(-width // columns)
        small = labels[:, ::down, ::right]
        if tuple(small.shape[1:]) != (rows, columns):
            raise _no_grid(labels, size, rule, 'stride')
        return small
    if height % rows or width % columns:
        raise _no_grid(labels, size, rule, 'whole number of pixels per cell')
    return _most_frequent(
        labels, height // rows, width // columns, num_classes,
        min_ratio if rule == 'ratio' else 0., ignore_index)


def downscale_labels(labels: Tensor,
                     factor: int,
                     num_classes: int,
                     min_ratio: float = 0.75,
                     ignore_index: int = IGNORE) -> Tensor:
    """One label for each cell of ``factor x factor`` pixels, if it is clear.

    A cell gets its most frequent label if that covers at least ``min_ratio``
    of the cell, else it is ignored. Ignored pixels count as a class of their
    own; of equally frequent labels the one with the lowest id is taken.
    DAFormer (Hoyer et al., CVPR 2022) compares ImageNet features where such
    a cell shows a thing class. No host sync, no one-hot map.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``; ids outside
            ``[0, num_classes)`` are ignored.
        factor (int): Side of a cell in pixels; divides H and W.
        num_classes (int): Number of classes C.
        min_ratio (float): In [0, 1].
        ignore_index (int): The label of an ignored cell.

    Returns:
        Tensor: int64, ``(N, H / factor, W / factor)``.

    Raises:
        ValueError: If the factor does not divide the height and the width.
    """
    height, width = labels.shape[1:]
    if height % factor or width % factor:
        raise ValueError(
            f'labels of {height} x {width} pixels have no whole number of '
            f'cells of {factor} x {factor}; use a crop whose sides are '
            f'multiples of {factor}')
    return _most_frequent(
        labels, factor, factor, num_classes, min_ratio, ignore_index)


def _most_frequent(labels: Tensor, down: int, right: int, num_classes: int,
                   min_ratio: float, ignore_index: int) -> Tensor:
    """The most frequent label of each cell of ``down x right`` pixels."""
    samples, height, width = labels.shape
    ids = ignored_last(labels, num_classes, ignore_index)
    cells = ids.view(samples, height // down, down, width // right,
                     right).transpose(2, 3).flatten(3)
    counts = torch.zeros(
        *cells.shape[:3], num_classes + 1, dtype=torch.int32,
        device=labels.device)
    counts.scatter_add_(3, cells, counts.new_ones(()).expand_as(cells))
    most, winner = counts.max(3)
    clear = most / (down * right) >= min_ratio
    return torch.where(clear & (winner < num_classes), winner, ignore_index)


def _hit(length: int, number: int, centre: bool, device: torch.device
         ) -> Tensor:
    """The pixel of each of ``number`` cells that a map of labels keeps."""
    places = torch.arange(number, device=device)
    # In whole numbers: torch's own floats miss floor(i H / h) at times.
    return (2 * places + centre) * length // (2 * number)


def _no_grid(labels: Tensor, size: Sequence[int], rule: str, lack: str
             ) -> ValueError:
    height, width = labels.shape[1:]
    return ValueError(
        f'label_downscale.rule = {rule!r} finds no {lack} from labels of '
        f'{height} x {width} pixels to a feature map of {size[0]} x '
        f"{size[1]}: set another crop_size, or rule='nearest', which works "
        'for any size')
