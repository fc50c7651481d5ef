"""The former name of `mmmae.training.sampling`."""

from ..training.sampling import StepSampler

__all__ = ["StepSampler"]
