"""What mmseg's model registry builds, besides the adaptation itself."""

from .clock import Clock
from .contrast_head import ContrastHead, Pixels
from .contrast_segmentor import ContrastEncoderDecoder
from .daformer_head import DAFormerHead
from .data_preprocessor import DomainDataPreprocessor
from .dlv2_head import DLV2Head
from .fusion import ASPPFusion, ConvFusion, ISAFusion
from .mit import ReferenceMixVisionTransformer
from .projection import Projection
from .slide import BatchedSlide, batched_slide, windows_per_pass
from .tta import UDATTAModel

__all__ = [
    'ASPPFusion', 'BatchedSlide', 'Clock', 'ContrastEncoderDecoder',
    'ContrastHead', 'ConvFusion', 'DAFormerHead', 'DLV2Head',
    'DomainDataPreprocessor', 'ISAFusion', 'Pixels', 'Projection',
    'ReferenceMixVisionTransformer', 'UDATTAModel', 'batched_slide',
    'windows_per_pass'
]
