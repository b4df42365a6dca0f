"""What mmseg's model registry builds, besides the adaptation itself."""

from .daformer_head import DAFormerHead
from .data_preprocessor import DomainDataPreprocessor
from .dlv2_head import DLV2Head
from .fusion import ASPPFusion, ConvFusion, ISAFusion
from .mit import ReferenceMixVisionTransformer
from .tta import UDATTAModel

__all__ = [
    'ASPPFusion', 'ConvFusion', 'DAFormerHead', 'DLV2Head',
    'DomainDataPreprocessor', 'ISAFusion', 'ReferenceMixVisionTransformer',
    'UDATTAModel'
]
