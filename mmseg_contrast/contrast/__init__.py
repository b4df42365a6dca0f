"""Banks: what is known of each class, for anchors to be compared with."""

from .bank import Bank
from .batch import BatchBank
from .gaussian import GaussianBank
from .prototypes import PrototypeBank, PrototypeTokens
from .queues import PixelQueue, SegmentQueue

__all__ = [
    'Bank', 'BatchBank', 'GaussianBank', 'PixelQueue', 'PrototypeBank',
    'PrototypeTokens', 'SegmentQueue'
]
