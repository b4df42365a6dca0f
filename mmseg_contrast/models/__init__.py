"""What mmseg's model registry builds, besides the adaptation itself."""

from .data_preprocessor import DomainDataPreprocessor

__all__ = ['DomainDataPreprocessor']
