"""Keys of the current batch."""

from __future__ import annotations

import torch
from mmseg.registry import MODELS
from torch import Tensor

from ..ops import pair_contrast_loss, same_label
from .bank import Bank


@MODELS.register_module()
class BatchBank(Bank):
    """The vectors of the batch itself, with their gradients.

    It has no state: keys are given with the anchors, or are the anchors, of
    which each is then compared with all others (ContrastiveSeg without a
    memory, CLUDA, supervised contrast). Keys are those of one rank.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        chunk_size (int, optional): Anchors that are compared at a time, see
            :func:`mmseg_contrast.ops.pair_contrast_loss`.
        ignore_index (int): Label that is ignored.
    """

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(chunk_size=chunk_size or 1)
        self.chunk_size = chunk_size

    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Nothing: there is nothing to remember.

        Args:
            embeddings (Tensor): Not used.
            labels (Tensor): Not used.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Not used.
            num_images (int): Not used.
        """

    def loss(self,
             anchors: Tensor,
             labels: Tensor,
             tau: float,
             own: str,
             base_tau: float | None = None,
             reduce_positives: str = 'mean',
             anchor_weights: Tensor | None = None,
             keys: Tensor | None = None,
             key_labels: Tensor | None = None,
             key_weights: Tensor | None = None) -> Tensor:
        """Contrast of anchors with keys, see :meth:`.bank.Bank.loss`.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive'.
            base_tau (float, optional): The loss is times ``tau / base_tau``.
            reduce_positives (str): 'mean' or 'lse'.
            anchor_weights (Tensor, optional): a, ``(N,)``.
            keys (Tensor, optional): ``(M, D)``. None: all other anchors.
            key_labels (Tensor, optional): int64, ``(M,)``; with the keys.
            key_weights (Tensor, optional): b, ``(M,)``; a pair's weight is
                ``a_i b_j``.

        Returns:
            Tensor: 0-d.

        Raises:
            ValueError: If only one of keys and their labels is given.
        """
        if (keys is None) != (key_labels is None):
            raise ValueError(
                'BatchBank.loss takes keys and key_labels, or neither')
        alone = keys is None
        keys = anchors if keys is None else keys
        key_labels = labels if key_labels is None else key_labels
        rule = same_label(self._mine(labels), self._mine(key_labels), -1)
        return pair_contrast_loss(
            anchors, keys, rule, tau, base_tau, own, reduce_positives, alone,
            anchor_weights, key_weights, self.chunk_size)

    def _mine(self, labels: Tensor) -> Tensor:
        return labels.where(
            self.known(labels), torch.full_like(labels, -1))
