"""Prompts, tokenizers, tokenised rows and the walk over them: data in, records out."""

from distill_system.data.examples import Example
from distill_system.data.frontier import PromptFrontier, SourceShare, source_shares
from distill_system.data.run_data import RunData, load_run_data, tokenizer_texts
from distill_system.data.sources import load_examples
from distill_system.data.tokenizers import build_tokenizer

__all__ = [
    "Example",
    "PromptFrontier",
    "RunData",
    "SourceShare",
    "build_tokenizer",
    "load_examples",
    "load_run_data",
    "source_shares",
    "tokenizer_texts",
]
