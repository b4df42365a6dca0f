r"""Contrast of feature vectors with what is known of each class.

Nearly all contrastive losses of the field are one function. An anchor i of
class y has an energy :math:`E_{ic}` with every class and a similarity
:math:`s_{ip}` with every positive:

.. math::
    L = \frac{1}{|A|} \sum_{i \in A} \frac{1}{|P_i|} \sum_{p \in P_i} \Big[
    \log \big(o_{ip} + \sum_{c \ne y_i} e^{E_{ic}} \big) - s_{ip} \Big]

where the own term :math:`o_{ip}` is :math:`e^{s_{ip}}` or
:math:`e^{E_{i y_i}}`. Minus infinity stands for what does not exist: a class
not yet seen, an empty place in a bank.

Everything is at least float32, also inside autocast, and waits for no device.
Here are energies and positives that are small enough to be kept;
:mod:`.contrast_keys` has the same loss for many keys, chunk by chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import IGNORE, known_labels
from .precision import full_precision

ABSENT = -float('inf')


def _similarities(anchors: Tensor, keys: Tensor, tau: float) -> Tensor:
    """Inner products over tau, ``(N, K)``, in full precision."""
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        return anchors.to(dtype) @ keys.to(dtype).T / tau


def prototype_energies(anchors: Tensor, mean: Tensor, tau: float,
                       present: Tensor | None = None) -> Tensor:
    r"""Energy with one vector for each class: :math:`f^T \mu_c / \tau`.

    Args:
        anchors (Tensor): f, ``(N, D)``.
        mean (Tensor): :math:`\mu`, ``(C, D)``.
        tau (float): Temperature, > 0.
        present (Tensor, optional): bool, ``(C,)``: classes that have been
            seen. None: all.

    Returns:
        Tensor: ``(N, C)``, minus infinity for absent classes.
    """
    energies = _similarities(anchors, mean, tau)
    return energies if present is None else energies.masked_fill(
        ~present, ABSENT)


def gaussian_energies(anchors: Tensor, mean: Tensor, variance: Tensor,
                      tau: float, present: Tensor | None = None) -> Tensor:
    r"""Energy with a normal distribution for each class.

    .. math:: \log E[e^{f^T k / \tau}] = f^T \mu_c / \tau
        + (f^2)^T \sigma_c^2 / (2 \tau^2)

    for keys k with a diagonal covariance: infinitely many keys per class at
    once (SDCA, Li et al., 2021; SePiCo, Xie et al., 2023).

    Args:
        anchors (Tensor): f, ``(N, D)``.
        mean (Tensor): :math:`\mu`, ``(C, D)``.
        variance (Tensor): :math:`\sigma^2`, ``(C, D)``.
        tau (float): Temperature, > 0.
        present (Tensor, optional): See :func:`prototype_energies`.

    Returns:
        Tensor: ``(N, C)``, minus infinity for absent classes.
    """
    return prototype_energies(
        anchors, mean, tau, present) + variance_energies(
            anchors, variance, tau)


def variance_energies(anchors: Tensor, variance: Tensor, tau: float
                      ) -> Tensor:
    """What the variance adds in :func:`gaussian_energies`.

    Args:
        anchors (Tensor): f, ``(N, D)``.
        variance (Tensor): ``(C, D)``.
        tau (float): Temperature, > 0.

    Returns:
        Tensor: ``(N, C)``.
    """
    # Squares of half-precision anchors would lose half of their digits.
    wide = full_precision(anchors)
    return _similarities(wide.square(), variance, 2 * tau**2)


def bank_energies(anchors: Tensor, keys: Tensor, filled: Tensor, tau: float,
                  energy: str = 'mean') -> Tensor:
    r"""Similarity with the keys of each class, reduced to one number.

    Args:
        anchors (Tensor): f, ``(N, D)``.
        keys (Tensor): ``(C, L, D)``.
        filled (Tensor): bool, ``(C, L)``: which places hold a key.
        tau (float): Temperature, > 0.
        energy (str): 'mean' over the keys (SePiCo's BankCL), or 'lse', their
            logarithmic sum of exponentials: each key counts by itself
            (ContrastiveSeg, Wang et al., ICCV 2021). 'lse' needs memory
            of the size ``N x C x L``.

    Returns:
        Tensor: ``(N, C)``, minus infinity for classes without a key.

    Raises:
        ValueError: If ``energy`` is neither.
    """
    check_choice('energy', energy, ('mean', 'lse'))
    count = filled.sum(1)
    if energy == 'lse':
        every = _similarities(anchors, keys.flatten(0, 1), tau)
        every = every.view(-1, *filled.shape).masked_fill(~filled, ABSENT)
        return finite_logsumexp(every, 2)
    keys = full_precision(keys)
    total = torch.where(filled.unsqueeze(2), keys, 0.).sum(1)
    # The mean of inner products is the inner product with the mean.
    mean = total / count.clamp_min(1).unsqueeze(1)
    return prototype_energies(anchors, mean, tau, count > 0)


def own_class(energies: Tensor, labels: Tensor, ignore_index: int = IGNORE
              ) -> Tensor:
    """Each anchor's entry for its own class, as its only positive.

    Args:
        energies (Tensor): ``(N, C)``, see :func:`prototype_energies`.
        labels (Tensor): int64, ``(N,)``.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: ``(N, 1)``, minus infinity for anchors without a class.
    """
    known = known_labels(labels, energies.shape[1], ignore_index).unsqueeze(1)
    ids = labels.unsqueeze(1).where(known, labels.new_zeros(()))
    return energies.gather(1, ids).masked_fill(~known, ABSENT)


def bank_positives(anchors: Tensor, labels: Tensor, keys: Tensor,
                   filled: Tensor, tau: float, ignore_index: int = IGNORE
                   ) -> Tensor:
    """Similarities with all keys of the anchor's own class.

    Args:
        anchors (Tensor): ``(N, D)``.
        labels (Tensor): int64, ``(N,)``.
        keys (Tensor): ``(C, L, D)``.
        filled (Tensor): bool, ``(C, L)``: which places hold a key.
        tau (float): Temperature, > 0.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: ``(N, L)``, minus infinity where there is no key or class.
    """
    classes, length = filled.shape
    every = _similarities(anchors, keys.flatten(0, 1), tau)
    every = every.masked_fill(~filled.flatten(), ABSENT)
    known = known_labels(labels, classes, ignore_index).view(-1, 1, 1)
    ids = labels.view(-1, 1, 1).where(known, labels.new_zeros(()))
    own = every.view(-1, classes, length).gather(
        1, ids.expand(-1, 1, length)).squeeze(1)
    return own.masked_fill(~known.squeeze(2), ABSENT)


def contrast_terms(energies: Tensor,
                   positives: Tensor,
                   labels: Tensor,
                   own: str = 'energy',
                   reduce_positives: str = 'mean',
                   anchor_weights: Tensor | None = None,
                   positive_weights: Tensor | None = None,
                   ignore_index: int = IGNORE,
                   extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What each anchor contributes to :func:`contrast_loss`.

    Args:
        energies (Tensor): See :func:`contrast_loss`, as all others.
        positives (Tensor): See there.
        labels (Tensor): See there.
        own (str): See there.
        reduce_positives (str): See there.
        anchor_weights (Tensor, optional): See there.
        positive_weights (Tensor, optional): See there.
        ignore_index (int): See there.
        extra (Tensor, optional): See there.

    Returns:
        tuple: Terms, ``(N,)``, 0 for what does not count, and bool ``(N,)``:
        which anchors count.
    """
    dtype = torch.promote_types(energies.dtype, torch.float32)
    energies, positives = energies.to(dtype), positives.to(dtype)
    known = known_labels(labels, energies.shape[1], ignore_index).unsqueeze(1)
    ids = labels.unsqueeze(1).where(known, labels.new_zeros(()))
    if reduce_positives == 'lse':
        positives = finite_logsumexp(positives, 1).unsqueeze(1)
    own_term = positives if own == 'positive' else energies.gather(1, ids)
    # Not isfinite: a NaN must show.
    counts = known & (positives != ABSENT) & (own_term != ABSENT)
    # Far below every energy, but not minus infinity: a row of nothing else,
    # where an anchor's class is the only one, would have NaN gradients.
    floor = torch.finfo(dtype).min / 2
    others = energies.scatter(1, ids, floor)
    if extra is not None:
        others = torch.cat([others, extra.to(dtype).unsqueeze(1)], 1)
    others = others.logsumexp(1, keepdim=True)
    # log(exp(own) + exp(others)) - positive, exact in both tails.
    terms = own_term - positives - F.logsigmoid(own_term - others)
    # Masked before it is weighted, or weights would get NaN gradients.
    terms = terms.where(counts, terms.new_zeros(()))
    if positive_weights is not None:
        terms = terms * positive_weights.to(dtype)
    number = counts.sum(1)
    each = terms.sum(1) / number.clamp_min(1)
    if anchor_weights is not None:
        each = each * anchor_weights.to(dtype)
    return each, number > 0


def contrast_loss(energies: Tensor,
                  positives: Tensor,
                  labels: Tensor,
                  own: str = 'energy',
                  ignore_index: int = IGNORE,
                  reduce_positives: str = 'mean',
                  anchor_weights: Tensor | None = None,
                  positive_weights: Tensor | None = None,
                  extra: Tensor | None = None) -> Tensor:
    """The loss at the top of this file.

    Anchors without a class, or whose class has no positive, do not count;
    without any anchor the loss is 0, of the graph, with zero gradients.

    Args:
        energies (Tensor): E, ``(N, C)``; minus infinity for absent classes.
        positives (Tensor): s, ``(N, P)``; minus infinity for absent ones.
        labels (Tensor): y, int64, ``(N,)``; ids outside ``[0, C)`` are
            ignored.
        own (str): 'energy' puts the energy with the own class into the
            denominator (cross entropy, SupCon), 'positive' each positive
            itself (InfoNCE).
        ignore_index (int): Label that is ignored.
        reduce_positives (str): 'mean' of the terms of all positives, or
            'lse': one positive, the logarithmic sum of exponentials of all.
        anchor_weights (Tensor, optional): a, ``(N,)``.
        positive_weights (Tensor, optional): b, ``(N, P)``; a term is times
            a b, but the means divide by numbers of anchors and positives,
            not by sums of weights. With the gradients of both.
        extra (Tensor, optional): ``(N,)``: one more energy of each anchor
            in the denominator, such as that of synthetic negatives
            (:mod:`.hard_negatives`); minus infinity for none. With its
            gradient.

    Returns:
        Tensor: 0-d, float32 or wider.

    Raises:
        ValueError: If ``own`` or ``reduce_positives`` is none of these, or
            if positives have weights but not terms of their own.
    """
    check_form(own, reduce_positives, positive_weights is not None)
    each, counted = contrast_terms(
        energies, positives, labels, own, reduce_positives, anchor_weights,
        positive_weights, ignore_index, extra)
    return each.sum() / counted.sum().clamp_min(1)


def check_form(own: str, reduce_positives: str, weighted_positives: bool
               ) -> None:
    """Refuse what :func:`contrast_loss` does not define.

    Args:
        own (str): As there.
        reduce_positives (str): As there.
        weighted_positives (bool): Whether positives have weights.

    Raises:
        ValueError: Naming the argument.
    """
    check_choice('own', own, ('energy', 'positive'))
    check_choice('reduce_positives', reduce_positives, ('mean', 'lse'))
    if weighted_positives and reduce_positives == 'lse':
        raise ValueError(
            "reduce_positives = 'lse' makes one positive of all, so these "
            "have no weights of their own; use 'mean'")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is no choice.

    Args:
        name (str): The argument.
        value (str): Its value.
        choices (tuple[str, ...]): What it may be.

    Raises:
        ValueError: Naming the argument and its choices.
    """
    if value not in choices:
        raise ValueError(
            f'{name} = {value!r} must be '
            f'{" or ".join(map(repr, choices))}')


def temperature_scale(tau: float, base_tau: float | None) -> float:
    """The factor of a loss, ``tau / base_tau``; 1 without a base.

    Khosla et al., 2020, and ContrastiveSeg scale with it.

    Args:
        tau (float): Temperature, > 0.
        base_tau (float, optional): > 0.

    Raises:
        ValueError: If one is not above 0.
    """
    for name, value in (('tau', tau), ('base_tau', base_tau)):
        if value is not None and not value > 0:
            raise ValueError(f'{name} = {value} must be above 0')
    return 1. if base_tau is None else tau / base_tau


def finite_logsumexp(values: Tensor, dim: int) -> Tensor:
    """``logsumexp`` with gradients 0, not NaN, for rows without an entry.

    Args:
        values (Tensor): Minus infinity stands for no entry.
        dim (int): The dimension that goes.

    Returns:
        Tensor: Minus infinity for rows without an entry.
    """
    absent = values == ABSENT
    floor = torch.finfo(values.dtype).min / 2
    return values.masked_fill(absent, floor).logsumexp(dim).masked_fill(
        absent.all(dim), ABSENT)


def contrast_regularizer(anchors: Tensor,
                         labels: Tensor,
                         mean: Tensor,
                         tau: float,
                         present: Tensor | None = None,
                         ignore_index: int = IGNORE) -> Tensor:
    r"""SePiCo's regulariser on the mean anchor.

    .. math:: \frac{1}{C \ln C} \sum_c \log softmax(\bar f^T \mu / \tau)_c

    It is -1 where all classes are equally near and falls as one class
    dominates; the published sign, with a plus in the loss, is kept.

    Args:
        anchors (Tensor): ``(N, D)``; those with a label are averaged.
        labels (Tensor): int64, ``(N,)``.
        mean (Tensor): :math:`\mu`, ``(C, D)``.
        tau (float): Temperature, > 0.
        present (Tensor, optional): bool, ``(C,)``; the sum runs over these
            classes and C is their number. None: all, as published.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: 0-d; 0 without an anchor or with less than two classes.
    """
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    known = known_labels(labels, len(mean), ignore_index)
    kept = anchors.to(dtype).where(known.unsqueeze(1), anchors.new_zeros(
        (), dtype=dtype))
    number = known.sum()
    centre = kept.sum(0, keepdim=True) / number.clamp_min(1)
    if present is None:
        present = torch.ones_like(mean[:, 0], dtype=torch.bool)
    energies = prototype_energies(centre, mean, tau).squeeze(0)
    floor = torch.finfo(dtype).min / 2
    logs = energies.masked_fill(~present, floor).log_softmax(0)
    total = logs.where(present, logs.new_zeros(())).sum()
    classes = present.sum()
    scale = classes.clamp_min(2).to(dtype)
    defined = (number > 0) & (classes > 1)
    return total / (scale * scale.log()) * defined
