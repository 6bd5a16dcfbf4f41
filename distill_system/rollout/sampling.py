"""How one call of a rollout worker samples; checked before any engine sees it."""

from __future__ import annotations

from dataclasses import dataclass

from distill_system.errors import ConfigError

# vLLM replaces a temperature in (0, 0.01) by 0.01, which would make the recorded one a lie. At 100
# the most likely of any model's tokens is hardly likelier than the others.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.01, 100.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, truncation and length limit of a batch of rollouts.

    temperature: 0 (greedy) or 0.01 to 100.  top_p: (0, 1], 1 keeps the whole distribution.
    top_k: the so many most likely tokens; with it, the tokens kept are recorded; None keeps all.
    min_p: [0, 1), of the likeliest token's probability; 0 keeps all. min_p cuts first, then top_k,
    then top_p of what is left.
    max_response_tokens: a response is cut at this length.

    Raises: ConfigError naming the key.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    max_response_tokens: int

    def __post_init__(self) -> None:
        temperature = self.temperature
        if temperature and not _LOWEST_TEMPERATURE <= temperature <= _HIGHEST_TEMPERATURE:
            raise ConfigError(
                "rollout.sampling.temperature must be 0 (greedy) or a number from "
                f"{_LOWEST_TEMPERATURE} to {_HIGHEST_TEMPERATURE:g}, got {temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.sampling.top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"rollout.sampling.top_k must be at least 1, got {self.top_k}")
        if not 0.0 <= self.min_p < 1.0:
            raise ConfigError(f"rollout.sampling.min_p must lie in [0, 1), got {self.min_p}")
        if self.max_response_tokens < 1:
            raise ConfigError(
                "rollout.sampling.max_response_tokens must be at least 1, "
                f"got {self.max_response_tokens}"
            )
