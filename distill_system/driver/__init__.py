"""The story of a distillation on one page, what is written down of it, and what is measured."""

from distill_system.driver.driver import Driver
from distill_system.driver.measuring import Measuring

__all__ = ["Driver", "Measuring"]
