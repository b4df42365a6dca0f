"""Banks that keep keys of each class as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import bank_energies, bank_positives, class_contrast_loss
from .bank import Bank
from .negatives import HardNegativeMixing


class KeyBank(Bank):
    """Keys of each class, each of which anchors are compared with.

    A subclass says in :meth:`stored` where they are.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        energy (str): 'lse': each key is a negative by itself, as in
            ContrastiveSeg; 'mean': a class is one negative, its mean
            similarity, as in SePiCo's BankCL.
        chunk_size (int, optional): Anchors that are compared at a time, see
            :func:`mmseg_contrast.ops.class_contrast_loss`.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 energy: str = 'lse',
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(chunk_size=chunk_size or 1)
        self.check_choice('energy', energy, 'lse', 'mean')
        self.energy = energy
        self.chunk_size = chunk_size

    def stored(self) -> tuple[Tensor, Tensor]:
        """All places ``(C, L, D)``, and which hold a key, bool ``(C, L)``."""
        raise NotImplementedError

    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys ``(C L, D)`` and their classes, -1 for an empty place."""
        keys, there = self.stored()
        classes = torch.arange(self.num_classes, device=there.device)
        labels = torch.where(there, classes.unsqueeze(1), -1)
        return keys.flatten(0, 1), labels.flatten()

    def centres(self) -> tuple[Tensor, Tensor]:
        """Mean of the keys of each class, see :meth:`.bank.Bank.centres`."""
        keys, there = self.stored()
        number = there.sum(1)
        total = keys.where(there.unsqueeze(2), keys.new_zeros(())).sum(
            1, dtype=torch.promote_types(keys.dtype, torch.float32))
        return total / number.clamp_min(1).unsqueeze(1), number > 0

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class.

        With 'lse' all similarities exist at once; :meth:`loss` has but a
        chunk of them.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``, minus infinity for classes without a key.
        """
        return bank_energies(anchors, *self.stored(), tau, self.energy)

    def positives(self, anchors: Tensor, labels: Tensor, tau: float
                  ) -> Tensor:
        """Similarities of each anchor with all keys of its own class.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, L)``, minus infinity for what does not exist.
        """
        return bank_positives(
            anchors, labels, *self.stored(), tau, self.ignore_index)

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
        """Contrast of anchors with the keys, see :meth:`.bank.Bank.loss`.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive'.
            base_tau (float, optional): The loss is times ``tau / base_tau``.
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
        return class_contrast_loss(
            anchors, labels, *self.stored(), tau, base_tau, own,
            reduce_positives, self.energy, anchor_weights,
            ignore_index=self.ignore_index, chunk_size=self.chunk_size,
            extra=self.mixed(anchors, labels, tau, mixing, draws))
