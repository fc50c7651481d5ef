"""What a model costs: parameters, multiply-adds, bytes and launches by component, counted and never timed."""

from .report import Bill, Report, Row, profile

__all__ = ["Bill", "Report", "Row", "profile"]
