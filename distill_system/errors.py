"""Every error a user of the system can meet, in one small picklable tree.

DistillError
├── ConfigError        a key, value or combination in the configuration (also a ValueError)
├── DataError          a file, row or field that cannot be used (also a ValueError)
├── ModelError         a model or tokenizer that cannot be used, or does not fit its partner
├── RecordError        a record whose arrays disagree (also a ValueError)
├── ResourceError      the cluster cannot give what the configuration asks for
├── DeadlineError      a wait that took longer than it may (also a TimeoutError)
├── WorkerError        a worker died or failed; carries the worker's own traceback
├── NonFiniteError     NaN or infinity in a loss, gradient or weight (also an ArithmeticError)
├── TransferError      weights did not arrive at a rollout worker as they were sent
├── CollapseError      the student's text collapses, and the configuration ends such a run
└── RunStateError      a run directory or checkpoint that does not fit what is asked of it

Each message says what was expected, what came, which key, file or id, and what to do.
"""


class DistillError(Exception):
    """Root of the tree: catch this to catch everything the system raises on purpose."""


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
    """A wait that took longer than it may; the message names what was waited for."""


class WorkerError(DistillError):
    """A worker died or failed; the message carries its own traceback."""


class NonFiniteError(DistillError, ArithmeticError):
    """NaN or infinity in a loss, gradient or weight."""


class TransferError(DistillError):
    """Weights did not arrive at a rollout worker as they were sent."""


class CollapseError(DistillError):
    """The student's text collapses, and the configuration ends such a run."""


class RunStateError(DistillError):
    """A run directory or checkpoint that does not fit what is asked of it."""
