"""A run's plan: the vocabulary from the run's tokenizer, the rest from the models' config.json."""

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
    """Tokens of the run's tokenizer where a model of random weights takes its rows from it."""
    if config.teacher.architecture is None and config.student.architecture is None:
        return None
    if isinstance(config.tokenizer, TrainedTokenizer):
        return config.tokenizer.vocab_size  # it may turn out smaller where there is little text
    return vocabulary_size(build_tokenizer(config, None))
