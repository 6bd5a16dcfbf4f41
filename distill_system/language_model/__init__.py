"""The one room that knows Hugging Face causal language models: make, load, read, check.

Trajectories in -> the final hidden state before each response token out; the scorer reads the
teacher and the learner reads the student through the same functions.
"""

from distill_system.language_model.embeddings import load_embedding
from distill_system.language_model.models import (
    LanguageModel,
    build_language_model,
    check_linear_read,
    load_language_model,
    unembedding,
)
from distill_system.language_model.sequences import (
    SequenceBatch,
    group_by_length,
    read_hidden,
)

__all__ = [
    "LanguageModel",
    "SequenceBatch",
    "build_language_model",
    "check_linear_read",
    "group_by_length",
    "load_embedding",
    "load_language_model",
    "read_hidden",
    "unembedding",
]
