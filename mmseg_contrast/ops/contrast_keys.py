r"""The loss of :mod:`.contrast` for many keys, some anchors at a time.

With keys k the similarities are :math:`s_{ij} = f_i^T k_j / \tau`, one for
each of N anchors and M keys: 1024 anchors and a bank of 190,000 keys are
0.7 GiB, and autograd keeps several of that size. Here a chunk of anchors
after the other is compared with all keys, and its gradients are computed at
once (:mod:`.chunked_loss`): nothing of the size N x M is kept.

There are two forms. In the class form keys are sorted, ``(C, L, D)``: a
class's energy is the mean or the logarithmic sum of exponentials of its L
similarities, the positives are those of the anchor's own class. With the mean
most similarities are not needed, see :mod:`.contrast_means`. In the pair form
any relation says what is a positive and what a negative; it has two energies,
that of all positives and that of all negatives.

Keys may be detached (a bank) or part of the graph (this batch): gradients are
computed for whatever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunked_loss import (
    Inputs,
    Walk,
    anchors_at_once,
    chunked_loss,
    gradients_of,
    leaves_of,
)
from .contrast import ABSENT, check_choice, check_form, contrast_terms
from .contrast_means import mean_energy_walk
from .labels import IGNORE
from .pair_relation import PairRule

#: Similarities of a chunk: 32 MiB in float32 where there are two tensors of
#: their size, 8 MiB where there are some ten. The pair form has three where
#: its positives are one.
CLASS_FORM_ELEMENTS = 2**23
PAIR_FORM_ELEMENTS = 2**21
SINGLE_POSITIVE_ELEMENTS = 2**22

#: ``form(similarities, rows, anchor_weights, key_weights, extra,
#: with_gradient)`` gives the sum of the terms, the number of anchors and the
#: gradients of the sum with respect to similarities, both weights and extra.
Form = Callable[[Tensor, slice, Tensor | None, Tensor | None, Tensor | None,
                 bool], tuple[Tensor, Tensor, list[Tensor | None]]]


def class_contrast_loss(anchors: Tensor,
                        labels: Tensor,
                        keys: Tensor,
                        filled: Tensor,
                        tau: float,
                        base_tau: float | None = None,
                        own: str = 'positive',
                        reduce_positives: str = 'mean',
                        energy: str = 'lse',
                        anchor_weights: Tensor | None = None,
                        key_weights: Tensor | None = None,
                        ignore_index: int = IGNORE,
                        chunk_size: int | None = None,
                        extra: Tensor | None = None) -> Tensor:
    """Contrast of anchors with keys of known classes.

    Equal to :func:`.contrast.contrast_loss` of :func:`.contrast.bank_energies`
    and :func:`.contrast.bank_positives`.

    Args:
        anchors (Tensor): ``(N, D)``.
        labels (Tensor): int64, ``(N,)``; ids outside ``[0, C)`` are ignored.
        keys (Tensor): ``(C, L, D)``.
        filled (Tensor): bool, ``(C, L)``: which places hold a key.
        tau (float): Temperature, > 0.
        base_tau (float, optional): The loss is times ``tau / base_tau``.
        own (str): 'positive' or 'energy', see
            :func:`.contrast.contrast_loss`.
        reduce_positives (str): 'mean' or 'lse', see there.
        energy (str): 'lse' or 'mean' over the keys of a class.
        anchor_weights (Tensor, optional): ``(N,)``.
        key_weights (Tensor, optional): ``(C, L)``; a pair's weight is the
            product of both. They weight terms of positives, not negatives.
        ignore_index (int): Label that is ignored.
        chunk_size (int, optional): Anchors at a time. None: as many as give
            about 8 million similarities; with ``energy='mean'``, with which
            there are fewer, as many as need 32 MiB.
        extra (Tensor, optional): ``(N,)``, one more energy of each anchor,
            see :func:`.contrast.contrast_loss`.

    Returns:
        Tensor: 0-d, float32 or wider.

    Raises:
        ValueError: If an argument is none of these.
    """
    check_form(own, reduce_positives, key_weights is not None)
    check_choice('energy', energy, ('mean', 'lse'))
    classes, length = filled.shape
    flat = None if key_weights is None else key_weights.flatten()
    if energy == 'mean':
        walk = mean_energy_walk(
            anchors, labels, keys, filled, own, reduce_positives,
            ignore_index, chunk_size)
        return chunked_loss(walk, anchors, keys.flatten(0, 1), tau, base_tau,
                            anchor_weights, flat, extra)

    def form(similarities: Tensor, rows: slice, weights: Tensor | None,
             key_weights: Tensor | None, extra: Tensor | None,
             with_gradient: bool
             ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        mine = labels[rows]
        # Any class will do for what contrast_terms ignores.
        ids = mine.clamp(0, classes - 1)
        entries = similarities.view(-1, classes, length)
        entries.masked_fill_(~filled, ABSENT)
        index = ids.view(-1, 1, 1).expand(-1, 1, length)
        positives = entries.gather(1, index).squeeze(1)
        energies = _reduce_keys_(entries)
        with torch.set_grad_enabled(with_gradient):
            leaves = leaves_of(
                energies, positives, weights, key_weights, extra)
            pair = None if leaves[3] is None else (
                leaves[3].view(classes, length)[ids])
            each, counted = contrast_terms(
                leaves[0], leaves[1], mine, own, reduce_positives, leaves[2],
                pair, ignore_index, leaves[4])
            total = each.sum()
        if not with_gradient:
            return total, counted.sum(), []
        grads = gradients_of(total, leaves)
        if grads[0] is None:
            entries.zero_()
        else:
            entries.mul_(grads[0].unsqueeze(2))
        if grads[1] is not None:
            entries.scatter_add_(1, index, grads[1].unsqueeze(1))
        return total.detach(), counted.sum(), [similarities, *grads[2:]]

    step = anchors_at_once(chunk_size, CLASS_FORM_ELEMENTS, classes * length)
    return chunked_loss(
        _each_with_all(form, step), anchors, keys.flatten(0, 1), tau,
        base_tau, anchor_weights, flat, extra)


def pair_contrast_loss(anchors: Tensor,
                       keys: Tensor,
                       relation: Tensor | PairRule,
                       tau: float,
                       base_tau: float | None = None,
                       own: str = 'positive',
                       reduce_positives: str = 'mean',
                       exclude_self: bool = False,
                       anchor_weights: Tensor | None = None,
                       key_weights: Tensor | None = None,
                       chunk_size: int | None = None,
                       extra: Tensor | None = None) -> Tensor:
    """Contrast of anchors with keys by an arbitrary relation.

    Args:
        anchors (Tensor): ``(N, D)``.
        keys (Tensor): ``(M, D)``; may be the anchors themselves.
        relation (Tensor | PairRule): ``(N, M)``: positive values are
            positives, negative ones negatives, 0 is left out; or a rule that
            gives it for some anchors, see :mod:`.pair_relation`.
        tau (float): Temperature, > 0.
        base_tau (float, optional): The loss is times ``tau / base_tau``.
        own (str): 'positive' or 'energy', that of all positives, see
            :func:`.contrast.contrast_loss`.
        reduce_positives (str): 'mean' or 'lse', see there; with 'lse' both
            choices of ``own`` are the same.
        exclude_self (bool): Leave out the pairs of anchor i and key i.
        anchor_weights (Tensor, optional): ``(N,)``.
        key_weights (Tensor, optional): ``(M,)``; a pair's weight is the
            product of both. They weight terms of positives, not negatives.
            Or both are of rank R, ``(N, R)`` and ``(M, R)``, and a weight is
            an inner product, see :mod:`.pair_weights`.
        chunk_size (int, optional): Anchors at a time. None: as many as give
            about 2 million similarities, or twice that with
            ``own='energy'``.
        extra (Tensor, optional): ``(N,)``, one more energy of each anchor,
            see :func:`.contrast.contrast_loss`.

    Returns:
        Tensor: 0-d, float32 or wider.

    Raises:
        ValueError: If an argument is none of these.
    """
    check_form(own, reduce_positives, key_weights is not None)
    columns = [() if one is None else tuple(one.shape[1:])
               for one in (anchor_weights, key_weights)]
    if columns[0] != columns[1]:
        raise ValueError(
            'anchor_weights and key_weights must be vectors, or matrices '
            f'with as many columns, got {columns[0]} and {columns[1]}')
    device = anchors.device
    # Terms that are linear in the positives, or of their logarithmic sum of
    # exponentials, need no more than one number for all positives.
    single = key_weights is None and (
        own == 'energy' or reduce_positives == 'lse')
    elements = SINGLE_POSITIVE_ELEMENTS if single else PAIR_FORM_ELEMENTS

    def form(similarities: Tensor, rows: slice, weights: Tensor | None,
             key_weights: Tensor | None, extra: Tensor | None,
             with_gradient: bool
             ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        related = relation(rows) if callable(relation) else relation[rows]
        positive, negative = related > 0, related < 0
        if exclude_self:
            number = torch.arange(rows.start, rows.start + len(similarities),
                                  device=device)
            other = number.unsqueeze(1) != torch.arange(
                len(keys), device=device)
            positive, negative = positive & other, negative & other
        if single:
            return _single_positive_(
                similarities, positive, negative, reduce_positives, weights,
                extra, with_gradient)
        with torch.set_grad_enabled(with_gradient):
            leaves = leaves_of(similarities, weights, key_weights, extra)
            values = leaves[0]
            assert values is not None
            # As in contrast_terms: no minus infinity, whose gradient is NaN.
            floor = torch.finfo(values.dtype).min / 2
            others = values.masked_fill(~negative, floor).logsumexp(1)
            mine = others if own == 'positive' else values.masked_fill(
                ~positive, floor).logsumexp(1)
            of_anchor, pair = _pair_weights(leaves[1], leaves[2])
            each, counted = contrast_terms(
                torch.stack([mine, others], 1),
                values.masked_fill(~positive, ABSENT),
                torch.zeros(len(values), dtype=torch.int64, device=device),
                own, reduce_positives, of_anchor, pair, IGNORE, leaves[3])
            total = each.sum()
        if not with_gradient:
            return total, counted.sum(), []
        return total.detach(), counted.sum(), gradients_of(total, leaves)

    step = anchors_at_once(chunk_size, elements, len(keys), device)
    return chunked_loss(_each_with_all(form, step), anchors, keys, tau,
                        base_tau, anchor_weights, key_weights, extra)


def _pair_weights(weights: Tensor | None, key_weights: Tensor | None
                  ) -> tuple[Tensor | None, Tensor | None]:
    """Weights of anchors ``(n,)``, and those of pairs, ``(n or 1, M)``."""
    if key_weights is None:
        return weights, None
    if weights is None or weights.dim() == 1:
        return weights, key_weights.unsqueeze(0)
    return None, weights @ key_weights.T


def _single_positive_(similarities: Tensor, positive: Tensor,
                      negative: Tensor, reduce_positives: str,
                      weights: Tensor | None, extra: Tensor | None,
                      with_gradient: bool
                      ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The pair form with own = 'energy' and without weights of keys.

    Autograd sees three numbers of each anchor. There is one more tensor of
    the similarities' size, and these are overwritten.
    """
    part = torch.empty_like(similarities)

    def only(mask: Tensor, other: float) -> Tensor:
        return torch.where(
            mask, similarities, similarities.new_full((), other), out=part)

    # Not a sum of booleans, which would become int64 first.
    count = part.copy_(positive).sum(1, keepdim=True).clamp_min(1)
    mean = only(positive, 0.).sum(1, keepdim=True) / count
    floor = torch.finfo(part.dtype).min / 2
    top_near, top_apart = (
        only(mask, ABSENT).amax(1, keepdim=True).clamp_min(floor)
        for mask in (positive, negative))
    # Each pair is in one sum at most, so it needs one exponential.
    similarities.sub_(torch.where(
        positive, top_near, top_apart, out=part)).exp_()
    near = only(positive, 0.).sum(1, keepdim=True)
    apart = only(negative, 0.).sum(1, keepdim=True)
    with torch.set_grad_enabled(with_gradient):
        leaves = leaves_of(
            top_near + near.log(), top_apart + apart.log(), mean, weights,
            extra)
        mine, others, mean = leaves[:3]
        one = mine if reduce_positives == 'lse' else mean
        assert one is not None
        each, counted = contrast_terms(
            torch.cat([mine, others], 1), one.masked_fill(near == 0, ABSENT),
            torch.zeros(len(part), dtype=torch.int64, device=part.device),
            'energy', 'mean', leaves[3], None, IGNORE, leaves[4])
        total = each.sum()
    if not with_gradient:
        return total, counted.sum(), []
    of_near, of_apart, of_mean, *of_others = gradients_of(total, leaves)
    tiny = torch.finfo(part.dtype).tiny
    part.mul_(of_apart / apart.clamp_min(tiny))
    similarities.mul_(of_near / near.clamp_min(tiny))
    if of_mean is not None:
        similarities.add_(of_mean / count)
    slopes = torch.where(positive, similarities, part, out=part)
    return total.detach(), counted.sum(), [
        slopes, of_others[0], None, of_others[1]]


def _reduce_keys_(entries: Tensor) -> Tensor:
    """Energies ``(n, C)`` of similarities ``(n, C, L)``.

    The similarities are overwritten with the energies' derivatives with
    respect to them.
    """
    floor = torch.finfo(entries.dtype).min / 2
    top = entries.amax(2, keepdim=True).clamp_min(floor)
    total = entries.sub_(top).exp_().sum(2, keepdim=True)
    energies = (top + total.log()).squeeze(2)
    entries.div_(total.clamp_min(torch.finfo(entries.dtype).tiny))
    return energies


def _each_with_all(form: Form, step: int) -> Walk:
    """Compare some anchors after the others with all keys."""

    def walk(inputs: Inputs, needs: list[bool]
             ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        anchors, keys, anchor_weights, key_weights, extra = inputs
        grads = [
            torch.zeros_like(one) if need and one is not None else None
            for one, need in zip(inputs, needs, strict=True)]
        total = anchors.new_zeros(())
        number = torch.zeros((), dtype=torch.int64, device=anchors.device)
        # One for all chunks: new memory is not free.
        space = anchors.new_empty(min(step, len(anchors)), len(keys))
        for start in range(0, len(anchors), step):
            rows = slice(start, start + step)
            mine = anchors[rows]
            weights, more = (None if one is None else one[rows]
                             for one in (anchor_weights, extra))
            part, counted, slopes = form(
                torch.mm(mine, keys.T, out=space[:len(mine)]), rows,
                weights, key_weights, more, any(needs))
            total += part
            number += counted
            if not any(needs):
                continue
            similar, of_weights, of_keys, of_extra = slopes
            if grads[0] is not None and similar is not None:
                torch.mm(similar, keys, out=grads[0][rows])
            if grads[1] is not None and similar is not None:
                grads[1].addmm_(similar.T, mine)
            if grads[2] is not None and of_weights is not None:
                grads[2][rows] = of_weights
            if grads[3] is not None and of_keys is not None:
                grads[3] += of_keys
            if grads[4] is not None and of_extra is not None:
                grads[4][rows] = of_extra
        return total, number, grads

    return walk
