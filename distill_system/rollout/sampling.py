"""How one call of a rollout worker samples; checked before any engine sees it."""

from __future__ import annotations

from dataclasses import dataclass

from distill_system.errors import ConfigError

# vLLM replaces a temperature in (0, 0.01) by 0.01, which would make the recorded one a lie.
_LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, nucleus truncation and length limit of a batch of rollouts.

    temperature: 0 (greedy) or at least 0.01.  top_p: (0, 1], 1 keeps the whole distribution.
    max_response_tokens: a response is cut at this length.

    Raises: ConfigError naming the key.
    """

    temperature: float
    top_p: float = 1.0
    max_response_tokens: int

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not _LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(
                "rollout.sampling.temperature must be 0 (greedy) or a finite number of at least "
                f"{_LOWEST_TEMPERATURE}, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.sampling.top_p must lie in (0, 1], got {self.top_p}")
        if self.max_response_tokens < 1:
            raise ConfigError(
                "rollout.sampling.max_response_tokens must be at least 1, "
                f"got {self.max_response_tokens}"
            )
