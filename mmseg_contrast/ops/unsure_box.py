"""Where a net is least sure of what it sees.

CLUDA (Vayyat et al., 2022) takes HRDA's detail there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .crop_box import Box, BoxOfEach, crop_to_box, scale_box
from .sampling import pixel_entropy


@torch.no_grad()
def unsure_box(logits: Tensor, boxes: Sequence[Box], cell: int) -> BoxOfEach:
    """Of some boxes, that with the highest mean entropy in each image.

    Args:
        logits (Tensor): ``(N, C, h, w)``; one channel is the logit of a
            second class.
        boxes (Sequence[Box]): In pixels, all of one size. Of equal ones the
            first is taken.
        cell (int): Pixels for each logit, each way.

    Returns:
        BoxOfEach: In pixels.

    Raises:
        ValueError: If a box has no whole number of logits.
    """
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    entropy = pixel_entropy(logits)
    means = torch.stack([
        crop_to_box(entropy, scale_box(box, cell)).mean((1, 2))
        for box in boxes])
    return BoxOfEach(tuple(boxes), means.argmax(0))
