r"""Contrast of pixels that are seen at two resolutions.

CLUDA (Vayyat et al., 2022). Pixel i has a unit feature :math:`f_i` of the
context, :math:`g_i` of the detail, a label and an attention :math:`w_i` in
[0, 1]. With the term of a positive key k of another pixel

.. math:: \ell(f, k, K) = -\log
    \frac{e^{f k / \tau}}{e^{f k / \tau} + \sum_{n \in K} e^{f n / \tau}}

whose negatives K are all keys of another label, the loss is the mean over
pixels i and over the other pixels j of its label of

.. math:: \tfrac12 p_i p_j \left( w_i w_j \ell(f_i, f_j, F)
    + (1 - w_i w_j) \ell(f_i, g_j, G) \right)

with weights p of pseudo-labels. Each pair counts once: what the contrast
within the context does not get, the contrast with the detail gets.
"""

from __future__ import annotations

from torch import Tensor

from .contrast_keys import pair_contrast_loss
from .labels import IGNORE
from .pair_relation import same_label
from .pair_weights import split_weights
from .unit import unit


def resolution_contrast(context: Tensor,
                        labels: Tensor,
                        detail: Tensor | None = None,
                        attention: Tensor | None = None,
                        weights: Tensor | None = None,
                        tau: float = 1.,
                        ignore_index: int = IGNORE,
                        chunk_size: int | None = None) -> Tensor:
    """The loss at the top of this file.

    All pixels of a batch are one set. Pixels without a label are no anchors
    and no keys; anchors without a positive do not count; without any anchor
    the loss is 0, of the graph.

    Args:
        context (Tensor): f, ``(N, D)``, of any length: it is normalised.
        labels (Tensor): int64, ``(N,)``; negative ones are ignored too.
        detail (Tensor, optional): g, ``(N, D)``, of the same pixels. None:
            one resolution, the mean of the context's terms alone, times
            :math:`p_i p_j`, not halved.
        attention (Tensor, optional): w, ``(N,)``; only with a detail.
        weights (Tensor, optional): p, ``(N,)``. None: 1.
        tau (float): Temperature, > 0; published: 1.
        ignore_index (int): Label that is ignored.
        chunk_size (int, optional): See :func:`.pair_contrast_loss`.

    Returns:
        Tensor: 0-d, float32 or wider, with gradients of features, attention
        and weights.

    Raises:
        ValueError: If only one of detail and attention is given.
    """
    if (detail is None) != (attention is None):
        raise ValueError('resolution_contrast takes detail and attention '
                         'together, or none of both')
    relation = same_label(labels, labels, ignore_index)

    def loss(keys: Tensor, of_anchors: Tensor | None,
             of_keys: Tensor | None) -> Tensor:
        return pair_contrast_loss(
            anchors, keys, relation, tau, exclude_self=True,
            anchor_weights=of_anchors, key_weights=of_keys,
            chunk_size=chunk_size)

    anchors = unit(context)
    if detail is None or attention is None:
        return loss(anchors, weights, weights)
    near, across = split_weights(attention, weights)
    return .5 * (loss(anchors, *near) + loss(unit(detail), *across))
