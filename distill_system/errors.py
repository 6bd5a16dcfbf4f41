"""Every error a user of the system can meet, in one small picklable tree.

DistillError
├── ConfigError        a key, value or combination in the configuration (also a ValueError)
├── DataError          a file, row or field that cannot be used (also a ValueError)
├── ModelError         a model or tokenizer that cannot be used, or does not fit its partner
├── RecordError        a record whose arrays disagree (also a ValueError)
├── ResourceError      the cluster cannot give what the configuration asks for
├── DeadlineError      a wait that took longer than it may (also a TimeoutError)
├── WorkerError        a worker died or failed; carries the worker's own traceback
│   └── WorkerLostError  it is of no more use, and names it: a run may replace it
│       └── RepeatedLossError  the same call has cost a worker again
├── NonFiniteError     NaN or infinity in a loss, gradient or weight (also an ArithmeticError)
├── TransferError      weights did not arrive at a rollout worker as they were sent
├── CollapseError      the student's text collapses, and the configuration ends such a run
└── RunStateError      a run directory or checkpoint that does not fit what is asked of it

Each message says what was expected, what came, which key, file or id, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class DistillError(Exception):
    """Root of the tree: catch this to catch everything the system raises on purpose.

    worker: name of the worker in which it arose, pool-id; empty in this process.
    """

    worker = ""

    @property
    def pool(self) -> str:
        """The pool of that worker."""
        return self.worker.rpartition("-")[0]


class ConfigError(DistillError, ValueError):
    """A key, value or combination in the configuration."""


class DataError(DistillError, ValueError):
    """A file, row or field that cannot be used."""


class ModelError(DistillError, ValueError):
    """A model or tokenizer that cannot be used, or does not fit its partner."""


class RecordError(DistillError, ValueError):
    """A record whose arrays disagree; the message names its id."""


class ResourceError(DistillError):
    """The cluster cannot give what the configuration asks for."""


class DeadlineError(DistillError, TimeoutError):
    """A wait that took longer than it may; the message names what was waited for.

    late: names of the workers that have not answered.
    """

    def __init__(self, message: str, late: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.late = tuple(late)


class WorkerError(DistillError):
    """A worker died or failed; the message carries its own traceback."""


class WorkerLostError(WorkerError):
    """A worker died, cannot be reached, failed beyond use, or missed a deadline.

    worker: its name, pool-id; empty where even that is not known.
    brief: what happened in a line, for a run that goes on; None takes the message's first line.
    """

    def __init__(self, message: str, worker: str = "", brief: str | None = None) -> None:
        super().__init__(message)
        self.worker = worker
        self.brief = message.partition("\n")[0] if brief is None else brief

    @property
    def worker_id(self) -> int:
        """Its id in the pool; -1 where it is not known."""
        number = self.worker.rpartition("-")[2]
        return int(number) if number.isdigit() else -1


class RepeatedLossError(WorkerLostError):
    """The same call has lost a worker again: its arguments may be the cause.

    call: the reference under which it began.
    """

    def __init__(
        self, message: str, worker: str = "", brief: str | None = None, call: object = None
    ) -> None:
        super().__init__(message, worker, brief)
        self.call = call


class NonFiniteError(DistillError, ArithmeticError):
    """NaN or infinity in a loss, gradient or weight."""


class TransferError(DistillError):
    """Weights did not arrive at a rollout worker as they were sent."""


class CollapseError(DistillError):
    """The student's text collapses, and the configuration ends such a run."""


class RunStateError(DistillError):
    """A run directory or checkpoint that does not fit what is asked of it."""
