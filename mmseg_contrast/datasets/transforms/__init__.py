"""Transforms of the data room."""

from .map_labels import MapLabelIds
from .valid_region import MarkValidRegion, PackStreamInputs, PadValidRegion

__all__ = [
    'MapLabelIds', 'MarkValidRegion', 'PackStreamInputs', 'PadValidRegion'
]
