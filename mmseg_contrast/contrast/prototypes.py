"""One or a few vectors for each class: running means, or learnt ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    bank_energies,
    class_moments,
    gather_moments,
)
from .bank import Bank, new_share


@MODELS.register_module()
class PrototypeBank(Bank):
    """Running mean of the vectors of each class.

    The prototypes of SPCL, ProCA and SePiCo's ProtoCL. A batch is that of all
    ranks together. With several prototypes a class's energy is the
    logarithmic sum of exponentials over those that have been seen. A
    vector then counts for the prototype of its class that it has the
    largest cosine with. They start as fixed random directions, which have no
    energy before their first vector; nothing keeps them equally used, as the
    optimal transport of ProtoSeg would.

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
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(prototypes=prototypes)
        check_clock(self, clock, new_weight)
        self.prototypes = prototypes
        self.clock = clock
        self.new_weight = new_weight
        self.normalize = normalize
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
            embeddings, self._nearest(embeddings, labels),
            self.num_classes * self.prototypes, ignore_index=-1))
        added = moments[0].view_as(self.count)
        share = new_share(self.clock, self.new_weight, self.count, added,
                          self.mean.dtype).unsqueeze(2)
        change = moments[1].to(self.mean.dtype).view_as(self.mean) - self.mean
        self.mean += share * change
        self.count += added

    def _nearest(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Number of each vector's prototype; -1 for none."""
        known = self.known(labels)
        ids = labels.where(known, labels.new_zeros(()))
        nearest = labels.new_zeros(())
        if self.prototypes > 1:
            wide = torch.promote_types(embeddings.dtype, torch.float32)
            directions = F.normalize(self.mean, dim=2).to(wide)
            with torch.autocast(embeddings.device.type, enabled=False):
                cosines = embeddings.to(wide) @ directions.flatten(0, 1).T
            mine = cosines.view(-1, *self.count.shape).gather(
                1, ids.view(-1, 1, 1).expand(-1, 1, self.prototypes))
            nearest = mine.squeeze(1).argmax(1)
        return (ids * self.prototypes + nearest).where(
            known, labels.new_full((), -1))

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``, minus infinity for classes not yet seen.
        """
        mean = F.normalize(self.mean, dim=2) if self.normalize else self.mean
        return bank_energies(anchors, mean, self.count > 0, tau, 'lse')


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

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class, with both gradients.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``.
        """
        keys = F.normalize(self.tokens, dim=2) if (
            self.normalize) else self.tokens
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
