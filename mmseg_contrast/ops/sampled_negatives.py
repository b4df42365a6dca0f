r"""Contrast of queries with their class's mean and some drawn negatives.

ReCo (Liu et al., ICLR 2022) and U2PL (Wang et al., CVPR 2022): a query q of
class c has one positive, the mean :math:`\mu_c` of its class, and M negative
keys of its own, drawn among pixels of other classes (ReCo) or from a queue of
class c's negatives (U2PL):

.. math::
    L = \frac{1}{C'} \sum_c \frac{1}{|Q_c|} \sum_{q \in Q_c} -\log
    \frac{e^{\cos(q, \mu_c) / \tau}}
    {e^{\cos(q, \mu_c) / \tau} + \sum_m e^{\cos(q, k_m) / \tau}}

It is the loss of :mod:`.contrast` with each positive as its own term and one
other energy. Means and keys are without gradients.

Draws take uniform numbers; which negatives they are is an index of keys, so
that nothing random is in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .class_moments import class_moments
from .contrast import contrast_terms, finite_logsumexp
from .labels import IGNORE, ignored_last, known_labels
from .unit import unit

#: Numbers gathered at a time, 16 MiB in float32. Eight times slower on a CPU
#: from 32 MiB on, which are mapped anew each time.
CHUNK_ELEMENTS = 2**22


def sampled_contrast_loss(queries: Tensor,
                          labels: Tensor,
                          means: Tensor,
                          present: Tensor,
                          keys: Tensor,
                          negatives: Tensor,
                          exists: Tensor,
                          tau: float = 0.5,
                          ignore_index: int = IGNORE,
                          chunk_size: int | None = None) -> Tensor:
    """The loss at the top of this file, for given negatives.

    A query without a negative, or whose class has no mean, adds 0 and
    counts. C' is the number of ``present`` classes, as published: one
    without a query adds 0.

    Args:
        queries (Tensor): ``(A, D)``, with gradients.
        labels (Tensor): int64, ``(A,)``; ids outside ``[0, C)`` are ignored,
            as empty slots are.
        means (Tensor): ``(C, D)``.
        present (Tensor): bool, ``(C,)``: classes that have a mean.
        keys (Tensor): ``(K, D)``.
        negatives (Tensor): Numbers of each query's keys, int64, ``(A, M)``.
        exists (Tensor): bool, ``(A, M)``: which of them are keys.
        tau (float): Temperature, > 0.
        ignore_index (int): Label that is ignored.
        chunk_size (int, optional): Queries whose keys are gathered at a
            time. None: as many as give about 4 million numbers.

    Returns:
        Tensor: 0-d, float32 or wider; 0 with zero gradients where nothing
        counts.

    Raises:
        ValueError: If ``tau`` or ``chunk_size`` is out of range.
    """
    if not tau > 0:
        raise ValueError(f'tau = {tau} must be above 0')
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // max(
            1, negatives.shape[1] * keys.shape[1]))
    elif chunk_size < 1:
        raise ValueError(f'chunk_size = {chunk_size} must be at least 1')
    dtype = torch.promote_types(queries.dtype, torch.float32)
    classes = len(means)
    known = known_labels(labels, classes, ignore_index)
    ids = ignored_last(labels, classes, ignore_index)
    with torch.autocast(queries.device.type, enabled=False):
        vectors, centres, others = (
            unit(one.to(dtype)) for one in (
                queries, means.detach(), keys.detach()))
        mine = ids.where(known, ids.new_zeros(()))
        own = (vectors * centres[mine]).sum(1, keepdim=True) / tau
        products = _GatheredProducts.apply(
            vectors, others, negatives, chunk_size) / tau
        energies = torch.stack([own.squeeze(1), finite_logsumexp(
            products.masked_fill(~exists, -float('inf')), 1)], 1)
        # Class 0 is the positive.
        each, _ = contrast_terms(
            energies, own, torch.zeros_like(labels).where(
                known & present[mine], labels.new_full((), -1)),
            'positive')
    number = torch.zeros(classes + 1, dtype=dtype, device=queries.device)
    number.index_add_(0, ids, torch.ones_like(each))
    share = number.clamp_min(1).reciprocal()[:-1]
    weights = F.pad(share / present.sum().clamp_min(1), (0, 1))[ids]
    return (each * weights).sum()


class _GatheredProducts(torch.autograd.Function):
    """Inner products of each row with keys of its own.

    The gathered keys, ``A x M x D``, exist for a chunk of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, index: Tensor,
                chunk_size: int) -> Tensor:
        """``out[a, m] = rows[a] . keys[index[a, m]]``."""
        ctx.save_for_backward(keys, index)
        out = rows.new_empty(index.shape)
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            gathered = keys.index_select(0, index[part].flatten())
            torch.bmm(gathered.view(-1, index.shape[1], keys.shape[1]),
                      rows[part].unsqueeze(2), out=out[part].unsqueeze(2))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor
                 ) -> tuple[Tensor, None, None, None]:
        """With respect to the rows: keys weighted with their slopes."""
        keys, index = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                'the contrast with drawn negatives has no second derivative')
        return F.embedding_bag(
            index, keys, per_sample_weights=grad, mode='sum'), None, None, None


def similar_class_negatives(labels: Tensor,
                            key_labels: Tensor,
                            means: Tensor,
                            uniforms: Tensor,
                            tau: float = 0.5,
                            ignore_index: int = IGNORE
                            ) -> tuple[Tensor, Tensor]:
    r"""ReCo's negatives: of classes that are alike, more.

    For a query of class i the class of each negative is drawn from
    :math:`softmax_{j \ne i}(\cos(\mu_i, \mu_j) / \tau)` over the classes
    that have a key, and then one of its keys uniformly, all with replacement.

    Args:
        labels (Tensor): Of the queries, int64, ``(A,)``.
        key_labels (Tensor): Of the keys, int64, ``(K,)``; ids outside
            ``[0, C)`` are no keys.
        means (Tensor): :math:`\mu`, ``(C, D)``.
        uniforms (Tensor): In [0, 1), ``(2, A, M)``: for class and key.
        tau (float): Temperature, > 0.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Numbers of keys, int64, ``(A, M)``, and bool ``(A, M)``: which
        exist; none does if no other class has a key or the query no class.
    """
    classes = len(means)
    groups, order = ignored_last(
        key_labels, classes, ignore_index).sort(stable=True)
    edges = torch.searchsorted(groups, torch.arange(
        classes + 1, device=groups.device))
    starts, counts = edges[:-1], edges.diff()

    # In float64, where a uniform number below 1 times a sum is below it.
    units = F.normalize(means.detach().double(), dim=1)
    usable = (counts > 0) & ~torch.eye(
        classes, dtype=torch.bool, device=means.device)
    alike = (units @ units.T / tau).masked_fill(
        ~usable, torch.finfo(torch.float64).min / 2).softmax(1)
    shares = (alike * usable).cumsum(1)

    known = known_labels(labels, classes, ignore_index)
    mine = labels.where(known, labels.new_zeros(()))
    mark = uniforms[0].double() * shares[mine, -1:]
    chosen = torch.searchsorted(
        shares[mine], mark, right=True).clamp_max(classes - 1)
    index = starts[chosen] + (uniforms[1].double() * counts[chosen]).long()
    exists = (known & usable.any(1)[mine]).unsqueeze(1).expand_as(index)
    return order[index.clamp_max(len(order) - 1)], exists


def queue_negatives(labels: Tensor,
                    filled: Tensor,
                    length: int,
                    uniforms: Tensor,
                    ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """U2PL's negatives: uniformly from the queue of the query's class.

    With replacement. The queue holds keys that are not of the class, see
    :func:`.sampling.unreliable_class_members`.

    Args:
        labels (Tensor): Of the queries, int64, ``(A,)``.
        filled (Tensor): int64, ``(C,)``: vectors in each queue.
        length (int): Places of a queue, L.
        uniforms (Tensor): In [0, 1), ``(A, M)``.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Numbers of keys among ``keys.flatten(0, 1)``, int64,
        ``(A, M)``, and bool ``(A, M)``: which exist.
    """
    known = known_labels(labels, len(filled), ignore_index)
    mine = labels.where(known, labels.new_zeros(()))
    number = filled[mine].unsqueeze(1)
    index = mine.unsqueeze(1) * length + (uniforms.double() * number).long()
    return index, (known.unsqueeze(1) & (number > 0)).expand_as(index)


def reco_loss(features: Tensor,
              labels: Tensor,
              queries: Tensor,
              query_labels: Tensor,
              uniforms: Tensor,
              num_classes: int,
              tau: float = 0.5,
              ignore_index: int = IGNORE) -> Tensor:
    """ReCo's loss: means and negatives are those of the batch.

    Args:
        features (Tensor): ``(N, D)``, with gradients.
        labels (Tensor): int64, ``(N,)``; ids outside ``[0, C)`` are ignored.
        queries (Tensor): Which features are queries, int64, ``(A,)``.
        query_labels (Tensor): int64, ``(A,)``, ignored in empty slots.
        uniforms (Tensor): In [0, 1), ``(2, A, M)``, see
            :func:`similar_class_negatives`; published M: 512.
        num_classes (int): Number of classes C.
        tau (float): Temperature of the loss and of the draw, > 0.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: See :func:`sampled_contrast_loss`.

    Raises:
        ValueError: If ``tau`` is out of range.
    """
    keys = features.detach()
    count, means, _ = class_moments(keys, labels, num_classes, ignore_index)
    negatives, exists = similar_class_negatives(
        query_labels, labels, means, uniforms, tau, ignore_index)
    return sampled_contrast_loss(
        features.index_select(0, queries), query_labels, means, count > 0,
        keys, negatives, exists, tau, ignore_index)


def u2pl_loss(queries: Tensor,
              labels: Tensor,
              means: Tensor,
              present: Tensor,
              keys: Tensor,
              filled: Tensor,
              uniforms: Tensor,
              tau: float = 0.5,
              ignore_index: int = IGNORE) -> Tensor:
    """U2PL's loss: negatives come from queues of unreliable pixels.

    Args:
        queries (Tensor): ``(A, D)``, with gradients.
        labels (Tensor): int64, ``(A,)``, ignored in empty slots.
        means (Tensor): Of the teacher's reliable features of each class,
            ``(C, D)``.
        present (Tensor): bool, ``(C,)``: classes that have a mean.
        keys (Tensor): ``(C, L, D)``, see :func:`.sampling.push_members`.
        filled (Tensor): int64, ``(C,)``: vectors in each queue.
        uniforms (Tensor): In [0, 1), ``(A, M)``; published M: 50.
        tau (float): Temperature, > 0.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: See :func:`sampled_contrast_loss`.

    Raises:
        ValueError: If ``tau`` is out of range.
    """
    negatives, exists = queue_negatives(
        labels, filled, keys.shape[1], uniforms, ignore_index)
    return sampled_contrast_loss(
        queries, labels, means, present, keys.flatten(0, 1), negatives,
        exists, tau, ignore_index)
