"""mmseg's MiT with fused attention, and with the published LayerNorms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import (
    EfficientMultiheadAttention,
    TransformerEncoderLayer,
)
from mmseg.models.utils import PatchEmbed, nchw_to_nlc, nlc_to_nchw
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: torch's default, which SegFormer's release has in these two places.
PUBLISHED_EPS = 1e-5


class SDPAttention(EfficientMultiheadAttention):
    """mmseg's attention through ``scaled_dot_product_attention``.

    mmseg asks ``nn.MultiheadAttention`` for its weights, which nobody reads:
    so the softmax maps are computed one by one and kept for the backward.
    Parameters, names and dropout are the same. Without dropout of the
    attention no map of weights is stored.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int],
                identity: Tensor | None = None) -> Tensor:
        """Attend to the (reduced) tokens of the same image.

        Args:
            x (Tensor): Tokens, ``(N, H * W, D)``.
            hw_shape (tuple): H and W.
            identity (Tensor, optional): What is added; None: ``x``.

        Returns:
            Tensor: ``(N, H * W, D)``.
        """
        if identity is None:
            identity = x
        keys = x
        if self.sr_ratio > 1:
            keys = self.norm(nchw_to_nlc(self.sr(nlc_to_nchw(x, hw_shape))))
        attention = self.attn
        width = attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        query_bias = None if bias is None else bias[:width]
        other_bias = None if bias is None else bias[width:]
        query = F.linear(x, weight[:width], query_bias)
        key, value = F.linear(keys, weight[width:], other_bias).chunk(2, -1)
        query, key, value = (
            one.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for one in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value,
            dropout_p=attention.dropout if attention.training else 0.)
        out = attention.out_proj(out.transpose(1, 2).flatten(2))
        return identity + self.dropout_layer(self.proj_drop(out))


class SDPALayer(TransformerEncoderLayer):
    """mmseg's block, whose checkpoints allow several passes in one step.

    mmseg's ``with_cp`` takes torch's reentrant form: several passes through
    one module, as in each iteration of adaptation, fail in it under DDP.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attention and feed-forward net.

        Args:
            x (Tensor): Tokens, ``(N, H * W, D)``.
            hw_shape (tuple): H and W.

        Returns:
            Tensor: ``(N, H * W, D)``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._block, x, hw_shape, use_reentrant=False)
        return self._block(x, hw_shape)

    def _block(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = self.attn(self.norm1(x), hw_shape, identity=x)
        return self.ffn(self.norm2(x), hw_shape, identity=x)


_FUSED = {EfficientMultiheadAttention: SDPAttention,
          TransformerEncoderLayer: SDPALayer}


@MODELS.register_module()
class SDPAMixVisionTransformer(MixVisionTransformer):
    """``MixVisionTransformer`` with fused attention.

    Xie et al., 2021 (SegFormer). The same weights, names, initial values and
    outputs up to rounding as mmseg's, in less time and memory
    (:class:`SDPAttention`).

    Args:
        in_channels (int): Channels of the images.
        embed_dims (int): Channels of a head; times ``num_heads`` of a stage.
        num_stages (int): The length of the lists.
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
        act_cfg (dict, optional): Activation; None is GELU.
        norm_cfg (dict, optional): Norms; None is a LayerNorm with an eps of
            1e-6.
        pretrained (str, optional): As mmseg's: a file, short for init_cfg.
        init_cfg (dict, optional): Where the weights come from.
        with_cp (bool): Gradient checkpointing.
    """

    def __init__(self,
                 in_channels: int = 3,
                 embed_dims: int = 64,
                 num_stages: int = 4,
                 num_layers: Sequence[int] = (3, 4, 6, 3),
                 num_heads: Sequence[int] = (1, 2, 4, 8),
                 patch_sizes: Sequence[int] = (7, 3, 3, 3),
                 strides: Sequence[int] = (4, 2, 2, 2),
                 sr_ratios: Sequence[int] = (8, 4, 2, 1),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 mlp_ratio: int = 4,
                 qkv_bias: bool = True,
                 drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0,
                 act_cfg: dict | None = None,
                 norm_cfg: dict | None = None,
                 pretrained: str | None = None,
                 init_cfg: dict | None = None,
                 with_cp: bool = False) -> None:
        super().__init__(
            in_channels=in_channels,
            embed_dims=embed_dims,
            num_stages=num_stages,
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
            act_cfg=act_cfg or dict(type='GELU'),
            norm_cfg=norm_cfg or dict(type='LN', eps=1e-6),
            pretrained=pretrained,
            init_cfg=init_cfg,
            with_cp=with_cp)
        for module in self.modules():
            fused = _FUSED.get(type(module))
            if fused is not None:
                # Not built anew: that would draw other random weights.
                module.__class__ = fused


@MODELS.register_module()
class ReferenceMixVisionTransformer(SDPAMixVisionTransformer):
    """``SDPAMixVisionTransformer`` that is numerically SegFormer's release.

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
