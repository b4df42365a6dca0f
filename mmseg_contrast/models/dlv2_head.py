"""DeepLabV2's classifier."""

from __future__ import annotations

from collections.abc import Sequence

from mmseg.models.decode_heads.aspp_head import ASPPModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from .daformer_head import CROSS_ENTROPY


@MODELS.register_module()
class DLV2Head(BaseDecodeHead):
    """Sum of dilated 3 x 3 convolutions (Chen et al., 2017, DeepLabV2).

    No dropout, no norm and no other classifier.

    Args:
        in_channels (int): Channels of the stage used.
        num_classes (int): Classes.
        in_index (int): Which stage of the backbone.
        dilations (Sequence[int]): One convolution each. DeepLabV2 has
            ``(6, 12, 18, 24)``; the line of adaptation methods from
            AdaptSegNet to DAFormer's comparisons uses ``(6, 12)`` alone.
        align_corners (bool): How logits are resized.
        loss_decode (dict or Sequence[dict]): Losses.
        ignore_index (int): Label without a loss.
        sampler (dict, optional): mmseg's pixel sampler.
        out_channels (int, optional): mmseg's number of logits.
        threshold (float, optional): mmseg's, for one logit.
        init_cfg (dict): Initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        in_index: int = 3,
        dilations: Sequence[int] = (6, 12, 18, 24),
        align_corners: bool = False,
        loss_decode: dict | Sequence[dict] = CROSS_ENTROPY,
        ignore_index: int = 255,
        sampler: dict | None = None,
        out_channels: int | None = None,
        threshold: float | None = None,
        init_cfg: dict = dict(  # noqa: B006
            type='Normal', std=0.01, override=dict(name='aspp_modules'))
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            channels=1,
            num_classes=num_classes,
            out_channels=out_channels,
            threshold=threshold,
            dropout_ratio=0,
            norm_cfg=None,
            in_index=in_index,
            loss_decode=(loss_decode if isinstance(loss_decode, dict)
                         else list(loss_decode)),
            ignore_index=ignore_index,
            sampler=sampler,
            align_corners=align_corners,
            init_cfg=init_cfg)
        del self.conv_seg
        self.aspp_modules = ASPPModule(
            tuple(dilations), in_channels, self.out_channels, conv_cfg=None,
            norm_cfg=None, act_cfg=None)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits.

        Args:
            inputs (Sequence[Tensor]): Stages, ``(N, C_i, h_i, w_i)``.

        Returns:
            Tensor: ``(N, num_classes, h, w)`` of the stage used.
        """
        branches = self.aspp_modules(self._transform_inputs(inputs))
        return sum(branches[1:], branches[0])
