"""Trajectories on their way to the learner: how many, for which step, how old. Pure: no clock, no
workers."""

from distill_system.flow.window import StalenessWindow, Ticket

__all__ = ["StalenessWindow", "Ticket"]
