"""Plans a run's memory: vocabulary from its tokenizer, the rest from the models' config.json."""

from __future__ import annotations

from distill_system.config import RunConfig
from distill_system.config.data import TrainedTokenizer
from distill_system.data.tokenizers import build_tokenizer
from distill_system.planning import Plan, make_plan
from distill_system.run.vocabulary import vocabulary_size


def plan_run(config: RunConfig, *, device_gib: float) -> Plan:
    """What the run's workers will hold; nothing is started and nothing fetched.

    device_gib: memory of each GPU.
    Raises: ModelError if a model or tokenizer that is needed for it is not on this machine.
    """
    return make_plan(config, vocabulary=_vocabulary(config), device_gib=device_gib)


def _vocabulary(config: RunConfig) -> int | None:
    """The tokenizer's size if a model of random weights takes it over; None if none does."""
    if config.teacher.architecture is None and config.student.architecture is None:
        return None
    if isinstance(config.tokenizer, TrainedTokenizer):
        return config.tokenizer.vocab_size  # an upper bound: little text trains fewer tokens
    return vocabulary_size(build_tokenizer(config, None))
