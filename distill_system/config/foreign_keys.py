"""What other trainers call a setting, and the key that does it here.

A key that no model of ours knows is looked for here first: the names of TRL, transformers'
Trainer, Axolotl and LLaMA-Factory say what a person wants. The same names stand in tables in
docs/migrating.md.
"""

from __future__ import annotations

BATCH = "distill.student_prompts_per_step, distill.teacher_prompts_per_step"
STEPS = "distill.steps"
RATE = "distill.optimizer"
RESPONSE = "rollout.sampling.max_response_tokens"
PROMPT = "data.max_prompt_tokens"
EPOCH = "steps = epochs x prompts / prompts per step"
LENGTHS = "prompt and response have limits of their own"

OURS: dict[str, tuple[str, str]] = {
    # models
    "model_name_or_path": ("student.path", ""),
    "model_name": ("student.path", ""),
    "base_model": ("student.path", ""),
    "teacher_model_name_or_path": ("teacher.path", ""),
    "teacher_model": ("teacher.path", ""),
    # lengths and sampling
    "max_new_tokens": (RESPONSE, ""),
    "max_completion_length": (RESPONSE, ""),
    "max_tokens": (RESPONSE, ""),
    "max_prompt_length": (PROMPT, ""),
    "max_length": (f"{PROMPT}, {RESPONSE}", LENGTHS),
    "max_seq_length": (f"{PROMPT}, {RESPONSE}", LENGTHS),
    "sequence_len": (f"{PROMPT}, {RESPONSE}", LENGTHS),
    "cutoff_len": (f"{PROMPT}, {RESPONSE}", LENGTHS),
    "temperature": ("rollout.sampling.temperature", ""),
    "top_p": ("rollout.sampling.top_p", ""),
    "top_k": ("rollout.sampling.top_k", "null keeps all; of a loss: distill.objective.*.k"),
    "min_p": ("rollout.sampling.min_p", ""),
    # steps and batches
    "per_device_train_batch_size": (BATCH, "sequences of a step on all ranks together"),
    "train_batch_size": (BATCH, "sequences of a step on all ranks together"),
    "micro_batch_size": (BATCH, "sequences of a step on all ranks together"),
    "batch_size": (BATCH, "sequences of a step on all ranks together"),
    "gradient_accumulation_steps": (
        "learner.max_tokens_per_microbatch",
        "a step learns from all its sequences; this key bounds how many tokens are in memory",
    ),
    "max_steps": (STEPS, ""),
    "num_train_epochs": (STEPS, EPOCH),
    "num_epochs": (STEPS, EPOCH),
    "epochs": (STEPS, EPOCH),
    # optimizer
    "lr": (f"{RATE}.learning_rate", ""),
    "optim": (f"{RATE}.type", ""),
    "lr_scheduler_type": (f"{RATE}.schedule", ""),
    "lr_scheduler": (f"{RATE}.schedule", ""),
    "max_grad_norm": (f"{RATE}.max_gradient_norm", ""),
    "adam_beta1": (f"{RATE}.adam_betas", ""),
    "adam_beta2": (f"{RATE}.adam_betas", ""),
    "min_lr_rate": (f"{RATE}.final_learning_rate_fraction", ""),
    # objective
    "lmbda": ("distill.objective.on_policy_weight", "the share of the student's own text"),
    "beta": (
        "distill.objective.off_policy.mixture_weight, distill.objective.on_policy.mixture_weight",
        "of type generalized_jsd, as in --objective gkd",
    ),
    "seq_kd": ("distill.objective", "--objective seqkd"),
    "loss_type": ("distill.objective.type", "or a method by name: --objective"),
    # computing
    "bf16": ("learner.compute_dtype", ""),
    "fp16": ("learner.compute_dtype", "bfloat16 is the lower precision here"),
    "torch_dtype": ("learner.compute_dtype, rollout.student_engine.dtype, scoring.dtype", ""),
    "dtype": ("learner.compute_dtype, rollout.student_engine.dtype, scoring.dtype", ""),
    "gradient_checkpointing": ("learner.activation_checkpointing", ""),
    "fsdp": ("learner.shard_ranks, learner.offload", ""),
    "deepspeed": ("learner.shard_ranks, learner.offload", ""),
    "torch_compile": ("learner.compile", ""),
    "vllm_gpu_memory_utilization": ("rollout.student_engine.gpu_memory_utilization", ""),
    "vllm_tensor_parallel_size": ("pools.student_rollout.gpus", "GPUs of one worker"),
    # adapters
    "adapter": ("distill.update.type", "lora"),
    "finetuning_type": ("distill.update.type", "full or lora"),
    "use_peft": ("distill.update.type", "lora"),
    "lora_r": ("distill.update.rank", ""),
    "lora_rank": ("distill.update.rank", ""),
    "lora_alpha": ("distill.update.alpha", ""),
    "lora_target_modules": ("distill.update.target_modules", ""),
    "lora_target": ("distill.update.target_modules", ""),
    # data
    "dataset": ("data.prompts", ""),
    "datasets": ("data.prompts", ""),
    "dataset_name": ("data.prompts.name", "with type: datasets"),
    "dataset_dir": ("data.directory", ""),
    "train_file": ("data.prompts.path", ""),
    "eval_dataset": ("data.evaluation", ""),
    "val_set_size": ("data.held_out", "rows of their own"),
    "chat_template": ("data.use_chat_template", "the tokenizer's own is used"),
    # measuring, saving
    "output_dir": ("runs_directory, name", "a run's folder is runs_directory/name"),
    "run_name": ("name", ""),
    "eval_steps": ("distill.evaluate_every", "and distill.measure_every for held-out losses"),
    "eval_strategy": ("distill.evaluate_every", "steps, or epoch"),
    "evals_per_epoch": ("distill.evaluate_every", "steps, or epoch"),
    "logging_steps": ("distill.measure_every", "every step is logged; this one measures"),
    "save_steps": ("distill.checkpoint_every", ""),
    "save_total_limit": ("distill.keep_checkpoints", ""),
    "load_best_model_at_end": ("export.weights", "best"),
    "metric_for_best_model": ("distill.keep_best.metric", ""),
    "greater_is_better": ("distill.keep_best.mode", ""),
    "early_stopping_patience": ("distill.early_stopping.patience", ""),
    "early_stopping_threshold": ("distill.early_stopping.min_gain", ""),
    "resume_from_checkpoint": ("distill", "the option --resume"),
    "auto_resume_from_checkpoints": ("distill", "the option --resume"),
    # the hub
    "push_to_hub": ("hub.repository", ""),
    "hub_model_id": ("hub.repository", ""),
    "hub_private_repo": ("hub.private", ""),
    "hub_token": ("hub", "the token is read from the environment variable HF_TOKEN"),
    "token": ("hub", "the token is read from the environment variable HF_TOKEN"),
}
"""Name elsewhere -> our key or keys, and a remark for who comes from there."""


def find_ours(key: str) -> str | None:
    """The hint for a key of another trainer; None if it is none."""
    found = OURS.get(key)
    if found is None:
        return None
    ours, remark = found
    return f"it is {ours} here" + (f" ({remark})" if remark else "")
