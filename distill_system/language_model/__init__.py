"""The one room that knows Hugging Face causal language models: make, load, read, check.

Trajectories in -> the final hidden state before each response token out; the scorer reads the
teacher and the learner reads the student through the same functions.
"""

from distill_system.language_model.configuration_files import (
    one_line,
    read_configuration,
    read_generation_configuration,
)
from distill_system.language_model.embeddings import load_embedding, load_logit_cap
from distill_system.language_model.encoder_decoder import (
    find_decoder_start,
    may_hold_two_matrices,
    model_class,
    tie_weights,
)
from distill_system.language_model.families import (
    check_longest,
    choose_linear_modules,
    find_family,
    is_read_packed,
    logit_cap,
    require_trainable,
)
from distill_system.language_model.gguf_files import convert_gguf, is_gguf
from distill_system.language_model.models import (
    LanguageModel,
    build_language_model,
    check_linear_read,
    check_packed_read,
    cut_rows,
    load_language_model,
    unembedding,
)
from distill_system.language_model.packed_attention import PACKED_ATTENTION, choose_attention
from distill_system.language_model.quantised import check_quantised, is_quantised
from distill_system.language_model.sequences import (
    PackedPart,
    Part,
    SequenceBatch,
    count_parts,
    read_hidden,
    read_part,
)
from distill_system.language_model.settings import check_settings
from distill_system.language_model.streaming import build_empty_model, check_streamed, read_weights
from distill_system.language_model.weight_files import (
    check_weight_files,
    read_headers,
    require_all_tensors,
)

__all__ = [
    "PACKED_ATTENTION",
    "LanguageModel",
    "PackedPart",
    "Part",
    "SequenceBatch",
    "build_empty_model",
    "build_language_model",
    "check_linear_read",
    "check_longest",
    "check_packed_read",
    "check_quantised",
    "check_settings",
    "check_streamed",
    "check_weight_files",
    "choose_attention",
    "choose_linear_modules",
    "convert_gguf",
    "count_parts",
    "cut_rows",
    "find_decoder_start",
    "find_family",
    "is_gguf",
    "is_quantised",
    "is_read_packed",
    "load_embedding",
    "load_language_model",
    "load_logit_cap",
    "logit_cap",
    "may_hold_two_matrices",
    "model_class",
    "one_line",
    "read_configuration",
    "read_generation_configuration",
    "read_headers",
    "read_hidden",
    "read_part",
    "read_weights",
    "require_all_tensors",
    "require_trainable",
    "tie_weights",
    "unembedding",
]
