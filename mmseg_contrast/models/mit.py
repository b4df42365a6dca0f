"""mmseg's MiT with the LayerNorms of the published one."""

from __future__ import annotations

from collections.abc import Sequence

from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.utils import PatchEmbed
from mmseg.registry import MODELS
from torch import nn

#: torch's default, which SegFormer's release has in these two places.
PUBLISHED_EPS = 1e-5


@MODELS.register_module()
class ReferenceMixVisionTransformer(MixVisionTransformer):
    """``MixVisionTransformer`` that is numerically SegFormer's release.

    Xie et al., 2021 (SegFormer); Hoyer et al., CVPR 2022 (DAFormer). The
    released weights were trained with an eps of 1e-5 in the norm of each
    patch embedding and in that of the reduced keys, and 1e-6 elsewhere. mmseg
    has 1e-6 everywhere, which moves features by up to 2e-4. Keys and
    tensors are mmseg's.

    Args:
        in_channels (int): Channels of the images.
        embed_dims (int): Channels of a head; times ``num_heads`` of a stage.
        num_stages (int, optional): As mmseg's; the length of the lists.
        num_layers (Sequence[int]): Blocks of each stage.
        num_heads (Sequence[int]): Heads of each stage.
        patch_sizes (Sequence[int]): Kernels of the patch embeddings.
        strides (Sequence[int]): Their strides.
        sr_ratios (Sequence[int]): Spatial reduction of keys and values.
        out_indices (Sequence[int]): Stages to return.
        mlp_ratio (int): Hidden channels of the feed-forward net.
        qkv_bias (bool): Whether queries, keys and values have a bias.
        drop_rate (float): Dropout.
        attn_drop_rate (float): Dropout of the attention.
        drop_path_rate (float): Stochastic depth of the last block, growing
            linearly from 0.
        with_cp (bool): Gradient checkpointing.
        pretrained (str, optional): As mmseg's: a file, short for init_cfg.
        init_cfg (dict, optional): Where the weights come from.

    Raises:
        ValueError: If the numbers of stages differ.
    """

    def __init__(self,
                 in_channels: int = 3,
                 embed_dims: int = 64,
                 num_stages: int | None = None,
                 num_layers: Sequence[int] = (3, 6, 40, 3),
                 num_heads: Sequence[int] = (1, 2, 5, 8),
                 patch_sizes: Sequence[int] = (7, 3, 3, 3),
                 strides: Sequence[int] = (4, 2, 2, 2),
                 sr_ratios: Sequence[int] = (8, 4, 2, 1),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 mlp_ratio: int = 4,
                 qkv_bias: bool = True,
                 drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.1,
                 with_cp: bool = False,
                 pretrained: str | None = None,
                 init_cfg: dict | None = None) -> None:
        if num_stages not in (None, len(num_layers)):
            raise ValueError(
                f'backbone.num_stages is {num_stages}, but num_layers has '
                f'{len(num_layers)} entries.')
        super().__init__(
            in_channels=in_channels,
            embed_dims=embed_dims,
            num_stages=len(num_layers),
            num_layers=num_layers,
            num_heads=num_heads,
            patch_sizes=patch_sizes,
            strides=strides,
            sr_ratios=sr_ratios,
            out_indices=out_indices,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_cfg=dict(type='LN', eps=1e-6),
            with_cp=with_cp,
            pretrained=pretrained,
            init_cfg=init_cfg)
        for name, module in self.named_modules():
            published = (isinstance(module, PatchEmbed)
                         or name.endswith('.attn'))
            norm = getattr(module, 'norm', None)
            if published and isinstance(norm, nn.LayerNorm):
                norm.eps = PUBLISHED_EPS
