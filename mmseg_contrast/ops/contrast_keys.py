r"""The loss of :mod:`.contrast` for many keys, some anchors at a time.

With keys k the similarities are :math:`s_{ij} = f_i^T k_j / \tau`, one for
each of N anchors and M keys: 1024 anchors and a bank of 190,000 keys are
0.7 GiB, and autograd keeps several of that size. Here a chunk of anchors
after the other is compared with all keys, and its gradients are computed at
once: the loss is one number, so they are only scaled in the backward, and
nothing of the size N x M is kept. A second derivative does not exist.

There are two forms. In the class form keys are sorted, ``(C, L, D)``: a
class's energy is the mean or the logarithmic sum of exponentials of its L
similarities, the positives are those of the anchor's own class. In the pair
form any relation says what is a positive and what a negative; it has two
energies, that of all positives and that of all negatives.

Keys may be detached (a bank) or part of the graph (this batch): gradients are
computed for whatever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contrast import (
    ABSENT,
    check_choice,
    check_form,
    contrast_terms,
    temperature_scale,
)
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
            about 8 million similarities.
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
        energies = _reduce_keys_(entries, filled, energy)
        with torch.set_grad_enabled(with_gradient):
            leaves = _leaves(
                energies, positives, weights, key_weights, extra)
            pair = None if leaves[3] is None else (
                leaves[3].view(classes, length)[ids])
            each, counted = contrast_terms(
                leaves[0], leaves[1], mine, own, reduce_positives, leaves[2],
                pair, ignore_index, leaves[4])
            total = each.sum()
        if not with_gradient:
            return total, counted.sum(), []
        grads = _gradients(total, leaves)
        if grads[0] is None:
            entries.zero_()
        else:
            entries.mul_(grads[0].unsqueeze(2))
        if grads[1] is not None:
            entries.scatter_add_(1, index, grads[1].unsqueeze(1))
        return total.detach(), counted.sum(), [similarities, *grads[2:]]

    return _chunked_loss(
        form, anchors, keys.flatten(0, 1), tau, base_tau, anchor_weights,
        None if key_weights is None else key_weights.flatten(), extra,
        chunk_size, CLASS_FORM_ELEMENTS)


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
            leaves = _leaves(similarities, weights, key_weights, extra)
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
        return total.detach(), counted.sum(), _gradients(total, leaves)

    return _chunked_loss(form, anchors, keys, tau, base_tau, anchor_weights,
                         key_weights, extra, chunk_size, elements)


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
        leaves = _leaves(top_near + near.log(), top_apart + apart.log(),
                         mean, weights, extra)
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
    of_near, of_apart, of_mean, *of_others = _gradients(total, leaves)
    tiny = torch.finfo(part.dtype).tiny
    part.mul_(of_apart / apart.clamp_min(tiny))
    similarities.mul_(of_near / near.clamp_min(tiny))
    if of_mean is not None:
        similarities.add_(of_mean / count)
    slopes = torch.where(positive, similarities, part, out=part)
    return total.detach(), counted.sum(), [
        slopes, of_others[0], None, of_others[1]]


def _reduce_keys_(entries: Tensor, filled: Tensor, energy: str) -> Tensor:
    """Energies ``(n, C)`` of similarities ``(n, C, L)``.

    The similarities are overwritten with the energies' derivatives with
    respect to them.
    """
    count = filled.sum(1)
    if energy == 'mean':
        divisor = count.clamp_min(1).to(entries.dtype)
        total = entries.masked_fill_(~filled, 0.).sum(2)
        entries.copy_(filled / divisor.unsqueeze(1))
        return (total / divisor).masked_fill(count == 0, ABSENT)
    floor = torch.finfo(entries.dtype).min / 2
    top = entries.amax(2, keepdim=True).clamp_min(floor)
    total = entries.sub_(top).exp_().sum(2, keepdim=True)
    energies = (top + total.log()).squeeze(2)
    entries.div_(total.clamp_min(torch.finfo(entries.dtype).tiny))
    return energies


def _leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Starts of a graph of their own, where gradients are recorded."""
    return [None if one is None else one.detach().requires_grad_(
        torch.is_grad_enabled()) for one in tensors]


def _gradients(total: Tensor, leaves: list[Tensor | None]
               ) -> list[Tensor | None]:
    grads = iter(torch.autograd.grad(
        total, [one for one in leaves if one is not None],
        allow_unused=True))
    return [None if one is None else next(grads) for one in leaves]


def _chunked_loss(form: Form, anchors: Tensor, keys: Tensor, tau: float,
                  base_tau: float | None, anchor_weights: Tensor | None,
                  key_weights: Tensor | None, extra: Tensor | None,
                  chunk_size: int | None, elements: int) -> Tensor:
    scale = temperature_scale(tau, base_tau)
    if chunk_size is None:
        chunk_size = max(1, elements // max(1, len(keys)))
    elif chunk_size < 1:
        raise ValueError(f'chunk_size = {chunk_size} must be at least 1')
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, keys = anchors.to(dtype), keys.to(dtype)
        if not len(anchors) or not len(keys):
            # Zero, and connected to whatever asks for gradients.
            if extra is not None:  # infinite for no energy
                extra = extra.nan_to_num(0., 0., 0.)
            return sum((one.sum() * 0 for one in (
                keys, anchor_weights, key_weights, extra)
                if one is not None and one.requires_grad), anchors.sum() * 0)
        loss = _ChunkedLoss.apply(
            anchors / tau, keys,
            None if anchor_weights is None else anchor_weights.to(dtype),
            None if key_weights is None else key_weights.to(dtype),
            None if extra is None else extra.to(dtype),
            form, chunk_size, torch.is_grad_enabled())
        return loss * scale


class _ChunkedLoss(torch.autograd.Function):
    """Mean of a form's terms over all anchors, with the gradients."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, keys: Tensor,
                anchor_weights: Tensor | None, key_weights: Tensor | None,
                extra: Tensor | None, form: Form, chunk_size: int,
                recording: bool) -> Tensor:
        """Loss; gradients of what needs them are kept for the backward."""
        needs = [recording and need for need in ctx.needs_input_grad[:5]]
        inputs = (anchors, keys, anchor_weights, key_weights, extra)
        grads = [
            torch.zeros_like(one) if need and one is not None else None
            for one, need in zip(inputs, needs, strict=True)]
        total = anchors.new_zeros(())
        number = torch.zeros((), dtype=torch.int64, device=anchors.device)
        # One for all chunks: new memory is not free.
        space = anchors.new_empty(min(chunk_size, len(anchors)), len(keys))
        for start in range(0, len(anchors), chunk_size):
            rows = slice(start, start + chunk_size)
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
        number = number.clamp_min(1)
        ctx.save_for_backward(
            *(None if one is None else one.div_(number) for one in grads))
        return total / number

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times what arrives."""
        if torch.is_grad_enabled():  # create_graph=True
            # They would be constants, and a second derivative silently 0.
            raise RuntimeError(
                'the contrast of many keys has no second derivative; use '
                'contrast_loss of its energies and positives for one')
        return (*(None if one is None else one * scale
                  for one in ctx.saved_tensors), None, None, None)
