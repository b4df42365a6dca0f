"""Fusions of DAFormer's decoder: one convolution, an ASPP, or attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.aspp_head import ASPPModule
from mmseg.models.decode_heads.isa_head import SelfAttentionBlock
from mmseg.models.decode_heads.sep_aspp_head import (
    DepthwiseSeparableASPPModule,
)
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ConvFusion(ConvModule):
    """Fusion without context: one convolution, as in SegFormer's head.

    Args:
        in_channels (int): Channels of the concatenated embeddings.
        channels (int): Channels of the result.
        norm_cfg (dict): Norm.
        act_cfg (dict): Activation.
        align_corners (bool): Not used: nothing is resized.
        kernel_size (int): 1 in the published variant.
    """

    def __init__(self,
                 in_channels: int,
                 channels: int,
                 norm_cfg: dict,
                 act_cfg: dict,
                 align_corners: bool = False,
                 kernel_size: int = 1) -> None:
        super().__init__(
            in_channels, channels, kernel_size, padding=kernel_size // 2,
            norm_cfg=norm_cfg, act_cfg=act_cfg)


@MODELS.register_module()
class ASPPFusion(nn.Module):
    """Atrous spatial pyramid pooling, then a 3 x 3 convolution.

    Args:
        in_channels (int): Channels of the concatenated embeddings.
        channels (int): Channels of each branch and of the result.
        norm_cfg (dict): Norm.
        act_cfg (dict): Activation.
        align_corners (bool): How the pooled branch is resized.
        separable (bool): Depthwise separable branches: DAFormer's decoder.
            False is its ablation without them.
        dilations (Sequence[int]): One branch each; 1 is a 1 x 1 convolution.
        pool (bool): One more branch with the mean over the image.
    """

    def __init__(self,
                 in_channels: int,
                 channels: int,
                 norm_cfg: dict,
                 act_cfg: dict,
                 align_corners: bool = False,
                 separable: bool = True,
                 dilations: Sequence[int] = (1, 6, 12, 18),
                 pool: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvModule(in_channels, channels, 1, norm_cfg=norm_cfg,
                       act_cfg=act_cfg)) if pool else None
        kind = DepthwiseSeparableASPPModule if separable else ASPPModule
        self.aspp_modules = kind(
            dilations=tuple(dilations), in_channels=in_channels,
            channels=channels, conv_cfg=None, norm_cfg=norm_cfg,
            act_cfg=act_cfg)
        self.bottleneck = ConvModule(
            (len(dilations) + pool) * channels, channels, 3, padding=1,
            norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, in_channels, h, w)`` to ``(N, channels, h, w)``."""
        branches = self.aspp_modules(maps)
        if self.image_pool is not None:
            branches.insert(0, resize(
                self.image_pool(maps), size=maps.shape[2:], mode='bilinear',
                align_corners=self.align_corners))
        return self.bottleneck(torch.cat(branches, 1))


@MODELS.register_module()
class ISAFusion(nn.Module):
    """Interlaced sparse self-attention (Huang et al., 2019).

    Attention first among positions that are ``down_factor`` apart, then
    inside of tiles of that size.

    Args:
        in_channels (int): Channels of the concatenated embeddings.
        channels (int): Channels of the result.
        norm_cfg (dict): Norm.
        act_cfg (dict): Activation.
        align_corners (bool): Not used: nothing is resized.
        isa_channels (int): Channels of queries and keys.
        down_factor (tuple[int, int]): Height and width of a tile.
    """

    def __init__(self,
                 in_channels: int,
                 channels: int,
                 norm_cfg: dict,
                 act_cfg: dict,
                 align_corners: bool = False,
                 isa_channels: int = 256,
                 down_factor: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        self.down_factor = tuple(down_factor)
        self.in_conv = ConvModule(
            in_channels, channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.global_relation = _Attention(
            channels, isa_channels, norm_cfg, act_cfg)
        self.local_relation = _Attention(
            channels, isa_channels, norm_cfg, act_cfg)

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, in_channels, h, w)`` to ``(N, channels, h, w)``."""
        maps = self.in_conv(maps)
        height, width = maps.shape[2:]
        high, wide = self.down_factor
        below, right = -height % high, -width % wide
        top, left = below // 2, right // 2
        maps = F.pad(maps, (left, right - left, top, below - top))
        # (N, C, tile row, row in tile, tile column, column in tile)
        tiles = maps.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
        tiles = _attend(self.global_relation, tiles, (2, 4))
        tiles = _attend(self.local_relation, tiles, (3, 5))
        maps = tiles.flatten(4).flatten(2, 3)
        return maps[:, :, top:top + height, left:left + width]


class _Attention(SelfAttentionBlock):
    """mmseg's block with one convolution before queries and keys."""

    def __init__(self, channels: int, isa_channels: int, norm_cfg: dict,
                 act_cfg: dict) -> None:
        super().__init__(channels, isa_channels, conv_cfg=None,
                         norm_cfg=norm_cfg, act_cfg=act_cfg)
        for name in ('key_project', 'query_project'):
            setattr(self, name, self.build_project(
                channels, isa_channels, num_convs=1, use_conv_module=True,
                conv_cfg=None, norm_cfg=norm_cfg, act_cfg=act_cfg))


def _attend(relation: nn.Module, tiles: Tensor, axes: tuple[int, int]
            ) -> Tensor:
    """Attention over two axes of ``(N, C, ...)``; the others are a batch."""
    batch = [axis for axis in (0, 2, 3, 4, 5) if axis not in axes]
    order = [*batch, 1, *axes]
    moved = tiles.permute(order)
    shape = moved.shape
    result = relation(moved.reshape(-1, *shape[3:])).view(shape)
    back = [order.index(axis) for axis in range(6)]
    return result.permute(back)
