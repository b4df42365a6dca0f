"""DAFormer's decoder: embed all stages, fuse them with context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

SEPARABLE_ASPP = dict(
    type='ASPPFusion', separable=True, dilations=(1, 6, 12, 18))
CROSS_ENTROPY = dict(
    type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)


@MODELS.register_module()
class DAFormerHead(BaseDecodeHead):
    """Context-aware feature fusion (Hoyer et al., CVPR 2022, section 3.2).

    Each stage is embedded linearly, resized to the first one's resolution and
    concatenated; a fusion with a wide receptive field follows, then the
    classifier. Published variants of ``fusion``:

    ========  ==========================================================
    sepaspp   ``dict(type='ASPPFusion', separable=True)``, the default
    aspp      ``dict(type='ASPPFusion', separable=False)``
    isa       ``dict(type='ISAFusion')``
    conv      ``dict(type='ConvFusion')``
    ========  ==========================================================

    Args:
        in_channels (Sequence[int]): Channels of the stages used.
        in_index (Sequence[int]): Which stages of the backbone.
        num_classes (int): Classes.
        channels (int): Channels of the fused features.
        embed_dims (int or Sequence[int]): Channels of each embedding.
        fusion (dict): A module that is built with ``in_channels``,
            ``channels``, ``norm_cfg``, ``act_cfg`` and ``align_corners``.
        dropout_ratio (float): Dropout of channels before the classifier.
        norm_cfg (dict): Norm of the fusion.
        act_cfg (dict): Activation of the fusion.
        align_corners (bool): How maps are resized.
        loss_decode (dict or Sequence[dict]): Losses.
        ignore_index (int): Label without a loss.
        sampler (dict, optional): mmseg's pixel sampler.
        out_channels (int, optional): mmseg's number of logits.
        threshold (float, optional): mmseg's, for one logit.
        init_cfg (dict): Initial weights.

    Raises:
        ValueError: If the numbers of stages differ.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        in_index: Sequence[int] = (0, 1, 2, 3),
        channels: int = 256,
        embed_dims: int | Sequence[int] = 256,
        fusion: dict = SEPARABLE_ASPP,
        dropout_ratio: float = 0.1,
        norm_cfg: dict = dict(type='BN', requires_grad=True),  # noqa: B006
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        align_corners: bool = False,
        loss_decode: dict | Sequence[dict] = CROSS_ENTROPY,
        ignore_index: int = 255,
        sampler: dict | None = None,
        out_channels: int | None = None,
        threshold: float | None = None,
        init_cfg: dict = dict(  # noqa: B006
            type='Normal', std=0.01, override=dict(name='conv_seg'))
    ) -> None:
        if isinstance(embed_dims, int):
            embed_dims = [embed_dims] * len(in_index)
        if not len(in_channels) == len(in_index) == len(embed_dims):
            raise ValueError(
                f'DAFormerHead uses {len(in_index)} stages (in_index) but has '
                f'{len(in_channels)} in_channels and {len(embed_dims)} '
                'embed_dims.')
        super().__init__(
            in_channels=list(in_channels),
            channels=channels,
            num_classes=num_classes,
            out_channels=out_channels,
            threshold=threshold,
            dropout_ratio=dropout_ratio,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            in_index=list(in_index),
            input_transform='multiple_select',
            loss_decode=(loss_decode if isinstance(loss_decode, dict)
                         else list(loss_decode)),
            ignore_index=ignore_index,
            sampler=sampler,
            align_corners=align_corners,
            init_cfg=init_cfg)
        self.embed_layers = nn.ModuleDict({
            str(index): _LinearEmbedding(wide, dims) for index, wide, dims in
            zip(in_index, in_channels, embed_dims, strict=True)})
        self.fuse_layer = MODELS.build(dict(
            fusion,
            in_channels=sum(embed_dims),
            channels=channels,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            align_corners=align_corners))

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Fused features before the classifier.

        Args:
            inputs (Sequence[Tensor]): All stages, ``(N, C_i, h_i, w_i)``.

        Returns:
            Tensor: ``(N, channels, h_0, w_0)``.
        """
        stages = self._transform_inputs(inputs)
        size = stages[0].shape[2:]
        embedded = []
        for embed, stage in zip(
                self.embed_layers.values(), stages, strict=True):
            maps = embed(stage)
            if maps.shape[2:] != size:
                maps = resize(maps, size=size, mode='bilinear',
                              align_corners=self.align_corners)
            embedded.append(maps)
        return self.fuse_layer(torch.cat(embedded, 1))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits at the resolution of the first stage.

        Args:
            inputs (Sequence[Tensor]): All stages, ``(N, C_i, h_i, w_i)``.

        Returns:
            Tensor: ``(N, num_classes, h_0, w_0)``.
        """
        return self.cls_seg(self._forward_feature(inputs))


class _LinearEmbedding(nn.Module):
    """One linear map for all positions, with the published key ``proj``."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, C, h, w)`` to ``(N, channels, h, w)``."""
        tokens = self.proj(maps.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])
