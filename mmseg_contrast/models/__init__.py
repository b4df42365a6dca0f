"""What mmseg's model registry builds, besides the adaptation itself."""

from .data_preprocessor import DomainDataPreprocessor
from .tta import UDATTAModel

__all__ = ['DomainDataPreprocessor', 'UDATTAModel']
