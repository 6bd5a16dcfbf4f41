"""The two streams of a distillation: from prompts to what a step learns from."""

from distill_system.streams.asynchronous import AsynchronousStreams
from distill_system.streams.lockstep import LockstepStreams
from distill_system.streams.streams import Streams

__all__ = ["AsynchronousStreams", "LockstepStreams", "Streams"]
