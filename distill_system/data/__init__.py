"""Data in, records out: sources, tokenizers, the order of prompts, the trajectory store."""

from distill_system.data.encoder_prompts import end_prompts
from distill_system.data.examples import Example
from distill_system.data.fingerprints import fingerprint_model, fingerprint_tokenizer
from distill_system.data.frontier import (
    PromptFrontier,
    SourceShare,
    check_position,
    source_shares,
)
from distill_system.data.kept_records import longest_row
from distill_system.data.run_data import RunData, load_run_data, store_path, tokenizer_texts
from distill_system.data.sources import load_examples
from distill_system.data.stored_rows import SampleOrigin
from distill_system.data.stored_trajectories import (
    Selection,
    StoredTrajectories,
    read_trajectories,
)
from distill_system.data.target_store import TargetStore
from distill_system.data.tokenizers import build_tokenizer
from distill_system.data.trajectory_store import TrajectoryStore

__all__ = [
    "Example",
    "PromptFrontier",
    "RunData",
    "SampleOrigin",
    "Selection",
    "SourceShare",
    "StoredTrajectories",
    "TargetStore",
    "TrajectoryStore",
    "build_tokenizer",
    "check_position",
    "end_prompts",
    "fingerprint_model",
    "fingerprint_tokenizer",
    "load_examples",
    "load_run_data",
    "longest_row",
    "read_trajectories",
    "source_shares",
    "store_path",
    "tokenizer_texts",
]
