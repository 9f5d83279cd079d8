"""Matrices of trainings: arms x seeds at one budget, kept at points, sampled in variants, scored, compared."""

from .budget import Budget
from .plan import Arm, Matrix, Variant
from .results import Estimate, Results, curves
from .run import run_matrix

__all__ = ["Arm", "Budget", "Estimate", "Matrix", "Results", "Variant", "curves", "run_matrix"]
