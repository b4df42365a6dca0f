"""Streams of datasets, label maps, sampling, and the embedded streets."""

from .benchmarks import ACDCDataset, GTADataset, SynthiaDataset
from .class_stats import class_statistics
from .label_map import LabelMap
from .mapped import MappedDataset
from .rare_class import RareClassDraw, rare_class_probabilities
from .sampler import PositionSampler
from .stream import Stream
from .streams import StreamDataset
from .synthetic import (
    LoadSyntheticImage,
    LoadSyntheticLabels,
    SyntheticStreets,
)
from .transforms import (
    LoadPseudoLabels,
    MapLabelIds,
    MarkValidRegion,
    PackStreamInputs,
    PadValidRegion,
)

__all__ = [
    'ACDCDataset', 'GTADataset', 'LabelMap', 'LoadPseudoLabels',
    'LoadSyntheticImage', 'LoadSyntheticLabels', 'MapLabelIds',
    'MappedDataset', 'MarkValidRegion', 'PackStreamInputs', 'PadValidRegion',
    'PositionSampler', 'RareClassDraw', 'Stream', 'StreamDataset',
    'SynthiaDataset', 'SyntheticStreets', 'class_statistics',
    'rare_class_probabilities'
]
