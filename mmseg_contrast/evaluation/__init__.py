"""Metrics."""

from .iou import FieldIoUMetric
from .submission import SubmissionMetric

__all__ = ['FieldIoUMetric', 'SubmissionMetric']
