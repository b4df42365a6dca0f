"""A normal distribution for each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from ..ops import (
    class_moments,
    class_variance,
    gather_moments,
    gaussian_energies,
    own_class,
    prototype_energies,
    variance_energies,
)
from .bank import Bank, acceptable, new_share
from .prototypes import check_clock


@MODELS.register_module()
class GaussianBank(Bank):
    """Running mean and diagonal variance of the vectors of each class.

    Contrast with infinitely many keys drawn from it in closed form: SDCA (Li
    et al., 2021) and SePiCo's DistCL, see
    :func:`mmseg_contrast.ops.gaussian_energies`. The positive is the
    similarity with the mean, without the variance. A batch is that of all
    ranks together; variances are biased.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        clock (str): 'cumulative', 'ema' or 'batch', see
            :class:`.prototypes.PrototypeBank`. With 'ema' mean and variance
            are those of the mixture of the old distribution and the batch's.
        new_weight (float, optional): For 'ema' the weight of the new batch,
            see there.
        normalize (str): 'none' compares with the statistics as they are;
            'mean' with those of the keys divided by the length of the mean;
            'rows' scales the row of means and the row of variances to
            length 1 each, as SDCA does, by which the variance loses its
            size.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 clock: str = 'cumulative',
                 new_weight: float | None = None,
                 normalize: str = 'none',
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        check_clock(self, clock, new_weight)
        self.check_choice('normalize', normalize, 'none', 'mean', 'rows')
        self.clock = clock
        self.new_weight = new_weight
        self.normalize = normalize
        shape = (num_classes, channels)
        self.register_buffer(
            'count', torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer('mean', torch.zeros(shape))
        self.register_buffer('variance', torch.zeros(shape))

    @torch.no_grad()
    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Move mean and variance, see :meth:`.bank.Bank.update`.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Not used.
            num_images (int): Not used.
        """
        moments = gather_moments(class_moments(
            embeddings, labels, self.num_classes, self.ignore_index))
        dtype = self.mean.dtype
        share = new_share(self.clock, self.new_weight, self.count,
                          moments[0], dtype).unsqueeze(1)
        change = moments[1].to(dtype) - self.mean
        spread = class_variance(moments).to(dtype) - self.variance
        # The moments of a mixture; by numbers it is merge_moments.
        variance = self.variance + (
            share * spread + share * (1 - share) * change**2)
        mean = self.mean + share * change
        taken = acceptable(moments[0], mean, variance)
        rows = taken.unsqueeze(1)
        self.variance.copy_(variance.where(rows, self.variance))
        self.mean.copy_(mean.where(rows, self.mean))
        self.count += moments[0] * taken
        self.grow_older(taken)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Means ``(C, D)`` and their classes, -1 for one not yet seen."""
        classes = torch.arange(self.num_classes, device=self.count.device)
        return self.statistics()[0], torch.where(self.count > 0, classes, -1)

    def centres(self) -> tuple[Tensor, Tensor]:
        """The means, see :meth:`.bank.Bank.centres`."""
        return self.mean.clone(), self.count > 0

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance that anchors are compared with, ``(C, D)``."""
        if self.normalize == 'none':
            return self.mean, self.variance
        mean = F.normalize(self.mean, dim=1)
        if self.normalize == 'rows':
            return mean, F.normalize(self.variance, dim=1)
        length = self.mean.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return mean, self.variance / length**2

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``, minus infinity for classes not yet seen.
        """
        return gaussian_energies(
            anchors, *self.statistics(), tau, self.count > 0)

    def energies_and_positives(self, anchors: Tensor, labels: Tensor,
                               tau: float) -> tuple[Tensor, Tensor]:
        """See :meth:`.bank.Bank.energies_and_positives`.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
        """
        mean, variance = self.statistics()
        near = prototype_energies(anchors, mean, tau, self.count > 0)
        return (near + variance_energies(anchors, variance, tau),
                own_class(near, labels, self.ignore_index))

    def positives(self, anchors: Tensor, labels: Tensor, tau: float
                  ) -> Tensor:
        """Similarity of each anchor with the mean of its own class.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, 1)``, minus infinity for what does not exist.
        """
        mean, _ = self.statistics()
        return own_class(
            prototype_energies(anchors, mean, tau, self.count > 0), labels,
            self.ignore_index)
