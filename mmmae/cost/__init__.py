"""The cost report of a model: parameters, multiply-adds, bytes and launches by component, counted and never timed."""

from .report import Report, profile
from .table import CostTable, Row

__all__ = ["CostTable", "Report", "Row", "profile"]
