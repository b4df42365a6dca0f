"""One or a few vectors for each class: running means, or learnt ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    bank_energies,
    class_moments,
    class_sinkhorn,
    contrast_loss,
    gather_moments,
    own_class,
    prototype_energies,
    temperature_scale,
    unit,
)
from .bank import Bank, acceptable, new_share
from .negatives import HardNegativeMixing


@MODELS.register_module()
class PrototypeBank(Bank):
    """Running mean of the vectors of each class.

    The prototypes of SPCL, ProCA and SePiCo's ProtoCL. A batch is that of all
    ranks together. With several prototypes a vector counts for one of its
    class. They start as fixed random directions, which have no energy before
    their first vector.

    ProtoSeg (Zhou et al., CVPR 2022) has ten of each class with
    ``assign='transport'``, ``compare='prototype'``, a temperature of 0.1,
    ``clock='ema'`` with a ``new_weight`` of 0.001 and a ``distance_weight``
    of 0.1: published are weights of 0.01 for the contrast and of 0.001 for
    the distance. Transport is that of each rank by itself, as there.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        prototypes (int): Of each class, K.
        clock (str): 'cumulative' is the mean of everything ever seen, 'ema'
            an exponential moving average of the batches that have the class,
            'batch' the mean of the latest such batch.
        new_weight (float, optional): For 'ema' the weight of the new batch,
            in (0, 1]: ``mean = (1 - new_weight) * mean + new_weight *
            batch_mean``. SPCL's published alpha of 0.1 is the weight of the
            old mean, so 0.9 here.
        normalize (bool): Compare with the means scaled to length 1. The
            state itself is never scaled.
        assign (str): Which prototype of its class a vector is assigned to:
            'nearest' is the one with the largest cosine, 'transport' the one
            with the largest share in an optimal transport that uses all
            equally, see :func:`mmseg_contrast.ops.class_sinkhorn`.
        compare (str): 'class': a class's energy is the logarithmic sum of
            exponentials over its prototypes; 'prototype': each prototype is
            a class of its own, and the positive is the assigned one, as in
            ProtoSeg. This concerns :meth:`loss` only.
        distance_weight (float): For 'prototype': weight of the mean of
            ``(1 - s)^2``, s the inner product with the assigned prototype,
            which is added to the loss.
        iterations (int): Steps of the transport.
        epsilon (float): Its entropic regularisation, > 0.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    count: Tensor
    mean: Tensor

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 prototypes: int = 1,
                 clock: str = 'cumulative',
                 new_weight: float | None = None,
                 normalize: bool = False,
                 assign: str = 'nearest',
                 compare: str = 'class',
                 distance_weight: float = 0.,
                 iterations: int = 3,
                 epsilon: float = 0.05,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(prototypes=prototypes, iterations=iterations)
        self.check_choice('assign', assign, 'nearest', 'transport')
        self.check_choice('compare', compare, 'class', 'prototype')
        if not epsilon > 0:
            raise ValueError(
                f'PrototypeBank.epsilon must be above 0, got {epsilon}')
        if distance_weight and compare == 'class':
            raise ValueError(
                'PrototypeBank.distance_weight is of the distance to the '
                "assigned prototype: set compare = 'prototype', or leave it "
                'out')
        check_clock(self, clock, new_weight)
        self.prototypes = prototypes
        self.clock = clock
        self.new_weight = new_weight
        self.normalize = normalize
        self.assign = assign
        self.compare = compare
        self.distance_weight = distance_weight
        self.iterations = iterations
        self.epsilon = epsilon
        shape = (num_classes, prototypes)
        self.register_buffer('count', torch.zeros(shape, dtype=torch.int64))
        self.register_buffer('mean', torch.zeros(*shape, channels))
        if prototypes > 1:
            # The same on all ranks, whatever their seeds.
            self.mean.normal_(generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Move the means, see :meth:`.bank.Bank.update`.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Not used.
            num_images (int): Not used.
        """
        moments = gather_moments(class_moments(
            embeddings, self.assigned(embeddings, labels),
            self.num_classes * self.prototypes, ignore_index=-1))
        added = moments[0].view_as(self.count)
        share = new_share(self.clock, self.new_weight, self.count, added,
                          self.mean.dtype).unsqueeze(2)
        change = moments[1].to(self.mean.dtype).view_as(self.mean) - self.mean
        mean = self.mean + share * change
        taken = acceptable(added, mean)
        self.mean.copy_(mean.where(taken.unsqueeze(2), self.mean))
        self.count += added * taken
        self.grow_older(taken.any(1))

    @torch.no_grad()
    def assigned(self, embeddings: Tensor, labels: Tensor,
                 seen_only: bool = False) -> Tensor:
        """The prototype that each vector counts for.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            seen_only (bool): Only those that have been seen.

        Returns:
            Tensor: Numbers in ``[0, C K)``, int64 ``(N,)``; -1 for none.
        """
        known = self.known(labels)
        ids = labels.where(known, labels.new_zeros(()))
        chosen = torch.zeros_like(ids)
        if self.prototypes > 1:
            cosines = self._cosines(embeddings, ids)
            if seen_only:
                cosines = cosines.masked_fill(
                    self.count[ids] == 0, -float('inf'))
            if self.assign == 'transport':
                cosines = class_sinkhorn(
                    cosines, ids.where(known, ids + self.num_classes),
                    self.num_classes, self.iterations, self.epsilon)
            chosen = cosines.argmax(1)
        return (ids * self.prototypes + chosen).where(
            known, labels.new_full((), -1))

    def _cosines(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """With the prototypes of the class of each, ``(N, K)``."""
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        directions = F.normalize(self.mean, dim=2).to(wide)
        with torch.autocast(embeddings.device.type, enabled=False):
            every = F.normalize(embeddings.to(wide), dim=1) @ (
                directions.flatten(0, 1).T)
        return every.view(-1, *self.count.shape).gather(
            1, ids.view(-1, 1, 1).expand(-1, 1, self.prototypes)).squeeze(1)

    def vectors(self) -> Tensor:
        """What anchors are compared with, ``(C, K, D)``."""
        return F.normalize(self.mean, dim=2) if self.normalize else self.mean

    def entries(self) -> tuple[Tensor, Tensor]:
        """Prototypes ``(C K, D)`` and classes, -1 for one not yet seen."""
        classes = torch.arange(self.num_classes, device=self.count.device)
        labels = torch.where(self.count > 0, classes.unsqueeze(1), -1)
        return self.vectors().flatten(0, 1), labels.flatten()

    def centres(self) -> tuple[Tensor, Tensor]:
        """Means of the prototypes, weighted by their numbers of vectors."""
        total = self.count.sum(1)
        share = self.count.to(self.mean.dtype) / total.clamp_min(
            1).unsqueeze(1)
        return (share.unsqueeze(2) * self.mean).sum(1), total > 0

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``, minus infinity for classes not yet seen.
        """
        return bank_energies(
            anchors, self.vectors(), self.count > 0, tau, 'lse')

    def loss(self,
             anchors: Tensor,
             labels: Tensor,
             tau: float,
             own: str,
             base_tau: float | None = None,
             reduce_positives: str = 'mean',
             anchor_weights: Tensor | None = None,
             images: Tensor | None = None,
             blocks: Tensor | None = None,
             mixing: HardNegativeMixing | None = None,
             draws: Tensor | None = None,
             teacher: Tensor | None = None) -> Tensor:
        """Contrast of anchors with the means, see :meth:`.bank.Bank.loss`.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive'; the same with
                ``compare='prototype'``.
            base_tau (float, optional): The contrast, but not the distance,
                is times ``tau / base_tau``.
            reduce_positives (str): 'mean' or 'lse'.
            anchor_weights (Tensor, optional): ``(N,)``.
            images (Tensor, optional): Not used.
            blocks (Tensor, optional): Not used.
            mixing (HardNegativeMixing, optional): See there.
            draws (Tensor, optional): See there.
            teacher (Tensor, optional): Not used.

        Returns:
            Tensor: 0-d.
        """
        if self.compare == 'class':
            return super().loss(
                anchors, labels, tau, own, base_tau, reduce_positives,
                anchor_weights, mixing=mixing, draws=draws)
        scale = temperature_scale(tau, base_tau)
        target = self.assigned(anchors, labels, seen_only=True)
        energies = prototype_energies(
            anchors, self.vectors().flatten(0, 1), tau,
            (self.count > 0).flatten())
        positives = own_class(energies, target, ignore_index=-1)
        loss = scale * contrast_loss(
            energies, positives, target, own, -1, reduce_positives,
            anchor_weights,
            extra=self.mixed(anchors, labels, tau, mixing, draws))
        if not self.distance_weight:
            return loss
        there = positives != -float('inf')
        apart = 1 - tau * positives.masked_fill(~there, 1 / tau)
        each = (apart.square() * there).squeeze(1)
        if anchor_weights is not None:
            each = each * anchor_weights
        return loss + self.distance_weight * (
            each.sum() / there.sum().clamp_min(1))


@MODELS.register_module()
class PrototypeTokens(Bank):
    """Prototypes that are parameters, learnt by the loss.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        prototypes (int): Of each class; the energy is the logarithmic sum of
            exponentials over them.
        normalize (bool): Compare with tokens scaled to length 1.
        ignore_index (int): Label that is ignored.
    """

    remembers = False

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 prototypes: int = 1,
                 normalize: bool = True,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(prototypes=prototypes)
        self.normalize = normalize
        self.tokens = nn.Parameter(
            torch.empty(num_classes, prototypes, channels))
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, of deviation 0.02."""
        nn.init.trunc_normal_(self.tokens, std=0.02)

    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Nothing: the optimizer moves them.

        Args:
            embeddings (Tensor): Not used.
            labels (Tensor): Not used.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Not used.
            num_images (int): Not used.
        """

    def vectors(self) -> Tensor:
        """What anchors are compared with, ``(C, K, D)``, with gradients."""
        return unit(self.tokens, 2) if self.normalize else self.tokens

    def entries(self) -> tuple[Tensor, Tensor]:
        """Tokens ``(C K, D)`` and their classes."""
        vectors = self.vectors().detach()
        classes = torch.arange(self.num_classes, device=vectors.device)
        return vectors.flatten(0, 1), classes.repeat_interleave(
            vectors.shape[1])

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class, with both gradients.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``.
        """
        keys = self.vectors()
        filled = torch.ones_like(keys[..., 0], dtype=torch.bool)
        return bank_energies(anchors, keys, filled, tau, 'lse')


def check_clock(bank: Bank, clock: str, new_weight: float | None) -> None:
    """Refuse an unknown clock, and a weight without or out of use.

    Args:
        bank (Bank): Whose arguments these are.
        clock (str): See :class:`PrototypeBank`.
        new_weight (float, optional): See there.

    Raises:
        ValueError: Naming the argument.
    """
    bank.check_choice('clock', clock, 'cumulative', 'ema', 'batch')
    name = f'{type(bank).__name__}.new_weight'
    if clock != 'ema' and new_weight is not None:
        raise ValueError(f"{name} is the weight of a new batch with clock = "
                         f"'ema'; leave it out with {clock!r}")
    if clock == 'ema' and (new_weight is None or not 0 < new_weight <= 1):
        raise ValueError(f"{name}, the weight of a new batch with clock = "
                         f"'ema', must lie in (0, 1], got {new_weight}")
