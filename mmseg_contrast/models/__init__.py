"""What mmseg's model registry builds, besides the adaptation itself."""

from .clock import Clock
from .contrast_head import ContrastHead, Pixels
from .contrast_segmentor import ContrastEncoderDecoder, ContrastLoss
from .daformer_head import DAFormerHead
from .data_preprocessor import DomainDataPreprocessor
from .dlv2_head import DLV2Head
from .fusion import ASPPFusion, ConvFusion, ISAFusion
from .hrda import HRDASegmentor
from .hrda_head import HRDAHead, ScaleLogits
from .mit import ReferenceMixVisionTransformer, SDPAMixVisionTransformer
from .multi_scale import MultiScale
from .projection import Projection
from .slide import BatchedSlide, batched_slide, windows_per_pass
from .tta import UDATTAModel

__all__ = [
    'ASPPFusion', 'BatchedSlide', 'Clock', 'ContrastEncoderDecoder',
    'ContrastHead', 'ContrastLoss', 'ConvFusion', 'DAFormerHead', 'DLV2Head',
    'DomainDataPreprocessor', 'HRDAHead', 'HRDASegmentor', 'ISAFusion',
    'MultiScale', 'Pixels', 'Projection', 'ReferenceMixVisionTransformer',
    'SDPAMixVisionTransformer', 'ScaleLogits', 'UDATTAModel', 'batched_slide',
    'windows_per_pass'
]
