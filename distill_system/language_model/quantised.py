"""Folders of quantised weights: which can teach here, and what is said of the others.

A quantised model can only teach: its weights are not trained. transformers' own check says whether
the scorer can load it; whether vLLM agrees with it is measured before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers import AutoHfQuantizer

from distill_system.errors import ModelError
from distill_system.language_model.configuration_files import one_line


def is_quantised(config: Any) -> bool:
    """Whether config.json says that the weights are quantised."""
    return _settings(config) is not None


def check_quantised(config: Any, model: str, *, is_trained: bool, on_gpu: bool) -> None:
    """Refuse a quantised model that is trained, or that cannot be loaded where it is scored.

    model: what to call it in an error.  on_gpu: the scorer has a GPU, which this process need not.
    Raises: ModelError with the method's name and the ways out.
    """
    settings = _settings(config)
    if settings is None:
        return
    method = settings.get("quant_method") or "an unnamed method"
    problem: str | None
    if is_trained:
        problem = "a quantised model can teach and not be trained"
    elif settings.get("quant_method") is None:
        problem = "quantization_config names no quant_method"
    else:
        problem = _find_obstacle(settings, on_gpu)
    if problem:
        raise ModelError(
            f"{model}: its config.json says that its weights are quantised by {method}: {problem}. "
            "Give the model that it was quantised from, or load it where its packages are, "
            "`.dequantize()` it in transformers and save it to a new folder"
        )


def _settings(config: Any) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config, "compression_config", None)
    if settings is None:
        return None
    return settings if isinstance(settings, dict) else dict(settings.to_dict())


def _find_obstacle(settings: dict[str, Any], on_gpu: bool) -> str | None:
    """Why transformers cannot load weights of this kind; None if it can."""
    try:
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
    except Exception as error:  # by the method: ValueError, ImportError, TypeError
        return one_line(error)
    try:
        device = "cuda" if on_gpu else "cpu"
        quantizer.validate_environment(device_map={"": device}, dtype=torch.bfloat16)
    except ImportError as error:
        return one_line(error)
    except Exception as error:  # by the method: RuntimeError, ValueError, one of its package
        if on_gpu and not torch.cuda.is_available():
            return None  # it asks for the GPU that the scorer has and this process has not
        return one_line(error)
    return None
