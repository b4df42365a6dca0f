"""Metrics."""

from .iou import FieldIoUMetric

__all__ = ['FieldIoUMetric']
