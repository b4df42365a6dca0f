"""Self-training that bears wrong pseudo-labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import symmetric_cross_entropy, uniform_divergence

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class SymmetricCrossEntropy(nn.Module):
    """Cross entropy in both directions on pseudo-labels, and a regulariser.

    ProDA (Zhang et al., CVPR 2021): ``alpha CE + beta reverse CE`` (Wang et
    al., ICCV 2019) on pixels that count, and ``regular`` times the mean of
    ``-log p`` over all (MRKLD, Zou et al., ICCV 2019). It takes the place of
    the head's own losses on this view.

    Args:
        student (nn.Module): Given by the model.
        view (str): The view to learn from, such as a strongly augmented
            target.
        pseudo_label (str): Name in ``model.pseudo_labels`` of a policy for
            the same pixels; those of weight 0 are ignored, and others count
            alike.
        alpha (float): Weight of cross entropy.
        beta (float): Weight of the reverse one.
        regular (float): Weight of the regulariser.
        weight (float): Factor on the sum.
        update_norm (bool, optional): Whether this pass records batch-norm
            statistics. None: if the weight isn't 0.
    """

    def __init__(self,
                 student: nn.Module,
                 view: str = 'target',
                 pseudo_label: str = 'target',
                 alpha: float = 0.1,
                 beta: float = 1.0,
                 regular: float = 0.1,
                 weight: float = 1.0,
                 update_norm: bool | None = None) -> None:
        super().__init__()
        if student.out_channels == 1:
            raise ValueError(
                'SymmetricCrossEntropy in model.objectives needs a logit for '
                'each class, but the decode head has one channel.')
        self.view = view
        self.pseudo_label = pseudo_label
        self.needs = (view, )
        self.needs_pseudo_labels = (pseudo_label, )
        self.alpha = alpha
        self.beta = beta
        self.regular = regular
        self.weight = weight
        self.update_norm = weight != 0 if update_norm is None else update_norm
        self.align_corners = student.align_corners

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Both terms.

        Args:
            step (Step): The iteration.

        Returns:
            dict[str, Tensor]: ``loss_symmetric`` and ``loss_regular``.

        Raises:
            ValueError: If the decode head has no map of logits.
        """
        pseudo = step.pseudo_label(self.pseudo_label)
        logits = step.student(self.view).logits
        if logits is None:
            raise ValueError(
                'SymmetricCrossEntropy in model.objectives needs a map of '
                'logits, which model.segmentor.decode_head does not give.')
        labels = pseudo.labels.masked_fill(pseudo.weights == 0, 255)
        logits = F.interpolate(logits.float(), labels.shape[-2:],
                               mode='bilinear',
                               align_corners=self.align_corners)
        symmetric = symmetric_cross_entropy(
            logits, labels, self.alpha, self.beta)
        return dict(
            loss_symmetric=self.weight * symmetric,
            loss_regular=self.weight * self.regular
            * uniform_divergence(logits))
