"""Random blocks of an image, hidden.

MIC (Hoyer et al., CVPR 2023): the student predicts the hidden blocks of a
target image from what surrounds them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def block_grid(height: int, width: int, block: int) -> tuple[int, int]:
    """How many blocks an image has in each direction, at least one.

    The sides are rounded to whole blocks, which are stretched to fill the
    image: 540 rows have 8 blocks of 64, each 67 or 68 rows high.
    """
    return max(round(height / block), 1), max(round(width / block), 1)


def block_mask(uniforms: Tensor, height: int, width: int,
               ratio: float = 0.7) -> Tensor:
    """Which pixels stay visible.

    Args:
        uniforms (Tensor): In [0, 1), one for each block, ``(N, h, w)``; see
            :func:`block_grid`.
        height (int): Height H of the images.
        width (int): Width W of the images.
        ratio (float): Share of the blocks to hide, in [0, 1]; a block stays
            where its number is larger.

    Returns:
        Tensor: bool, ``(N, H, W)``.
    """
    visible = (uniforms > ratio).float().unsqueeze(1)
    visible = F.interpolate(visible, size=(height, width), mode='nearest')
    return visible.squeeze(1) > 0


def hide_blocks(images: Tensor, uniforms: Tensor, ratio: float = 0.7
                ) -> Tensor:
    """Normalised images with hidden blocks at 0, the mean colour.

    Args:
        images (Tensor): ``(N, C, H, W)``.
        uniforms (Tensor): See :func:`block_mask`.
        ratio (float): See :func:`block_mask`.

    Returns:
        Tensor: ``(N, C, H, W)``.
    """
    height, width = images.shape[-2:]
    visible = block_mask(uniforms, height, width, ratio)
    return images * visible.unsqueeze(1)
