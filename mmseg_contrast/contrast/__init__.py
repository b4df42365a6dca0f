"""Banks and samplers: what is known of each class; which pixels ask."""

from .bank import Bank
from .batch import BatchBank
from .gaussian import GaussianBank
from .memory import MemoryBank
from .negatives import HardNegativeMixing
from .prototypes import PrototypeBank, PrototypeTokens
from .queues import PixelQueue, SegmentQueue
from .samplers import (
    AllPixels,
    Anchors,
    HardEasy,
    LowEntropy,
    PerClassRandom,
    Sampler,
    Uncertain,
)

__all__ = [
    'AllPixels', 'Anchors', 'Bank', 'BatchBank', 'GaussianBank', 'HardEasy',
    'HardNegativeMixing', 'LowEntropy', 'MemoryBank', 'PerClassRandom',
    'PixelQueue', 'PrototypeBank', 'PrototypeTokens', 'Sampler',
    'SegmentQueue', 'Uncertain'
]
