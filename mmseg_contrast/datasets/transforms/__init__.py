"""Transforms of the data room."""

from .load_pseudo_labels import LoadPseudoLabels
from .map_labels import MapLabelIds
from .valid_region import MarkValidRegion, PackStreamInputs, PadValidRegion

__all__ = [
    'LoadPseudoLabels', 'MapLabelIds', 'MarkValidRegion', 'PackStreamInputs',
    'PadValidRegion'
]
