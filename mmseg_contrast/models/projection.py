"""From features to the vectors that contrast compares."""

from __future__ import annotations

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class Projection(BaseModule):
    """A few convolutions, pixel by pixel unless asked otherwise.

    ======================  ==============================================
    ContrastiveSeg, PiPa    two layers: 1x1, norm, ReLU, 1x1
    SePiCo                  two layers, norm and ReLU also after the last
    ReCo                    two layers, the first 3x3
    Zhao et al., 2021       three layers without norm
    SPCL, SDCA, ProCA, Hu   no layer: the features as they are
    ======================  ==============================================

    Args:
        in_channels (int): Width of the features.
        channels (int): Width of the result, D.
        layers (int): Number of convolutions, >= 0.
        hidden_channels (int, optional): Width between them; None is
            ``in_channels``.
        kernel_size (int): Of the first convolution, odd; the others are 1x1.
        norm_cfg (dict, optional): Norm after all convolutions but the last.
        last_act (bool): Norm and ReLU after the last one too. The vectors
            are then nowhere negative, so no cosine is.
        init_cfg (dict, optional): See mmengine's BaseModule.

    Raises:
        ValueError: If a number is out of range, or widths differ without a
            layer.
    """

    def __init__(self,
                 in_channels: int,
                 channels: int,
                 layers: int = 2,
                 hidden_channels: int | None = None,
                 kernel_size: int = 1,
                 norm_cfg: dict | None = dict(type='BN'),  # noqa: B006
                 last_act: bool = False,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if layers < 0:
            raise ValueError(f'projection.layers = {layers} must be >= 0')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f'projection.kernel_size = {kernel_size} must be odd')
        if layers == 0 and in_channels != channels:
            raise ValueError(
                f'ContrastHead.channels = {channels} must be the width of '
                f'the features, {in_channels}, without a projection: set '
                'projection.layers to 1 or more to change the width')
        hidden = hidden_channels or in_channels
        widths = [in_channels, *[hidden] * (layers - 1), channels]
        self.layers = nn.Sequential()
        for i in range(layers):
            size = kernel_size if i == 0 else 1
            act = i < layers - 1 or last_act
            self.layers.append(ConvModule(
                widths[i], widths[i + 1], size, padding=size // 2,
                norm_cfg=norm_cfg if act else None,
                act_cfg=dict(type='ReLU') if act else None))

    def forward(self, features: Tensor) -> Tensor:
        """Vectors of all positions.

        Args:
            features (Tensor): ``(N, in_channels, h, w)``.

        Returns:
            Tensor: ``(N, D, h, w)``.
        """
        return self.layers(features)
