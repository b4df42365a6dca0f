"""Weights of the published code, under the names that mmseg 1.x has.

``files`` reads and writes, ``mit`` maps the Mix Transformer, ``student`` the
whole model. Nothing here is registered; ``tools/model_converters`` uses it.
"""

from .files import check_target, read_weights, write_weights
from .mit import MitShape, convert_mit, is_published_mit, mit_shape
from .student import (
    PARTS,
    Converted,
    Fit,
    convert_backbone,
    convert_student,
    fit,
    table,
    take_part,
)

__all__ = [
    'PARTS', 'Converted', 'Fit', 'MitShape', 'check_target',
    'convert_backbone', 'convert_mit', 'convert_student', 'fit',
    'is_published_mit', 'mit_shape', 'read_weights', 'table', 'take_part',
    'write_weights'
]
