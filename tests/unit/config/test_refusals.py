"""Keys that contradict one another: refused by name, and taken where one of them gives way."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.config import load_config
from distill_system.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
STALENESS = "distill.staleness"
AHEAD = f"{STALENESS}.max_staleness=2"
MATCHING = "distill.objective={type: token_matching, "

SHARED = ("pools.learner.gpus=0.5", "pools.student_rollout.gpus=0.5")
ASLEEP = ("rollout.teacher_engine.sleep_when_idle=true", "pools.teacher_rollout.gpus=1")
PREFER = ("distill.objective.type=preference",)
OF_ROWS = (
    "distill.objective={type: preference, pairs: data}",
    "distill.off_policy_source=preferences",
    "data.preferences={type: jsonl, path: pairs.jsonl}",
)
TEXT = ("data.plain_text={type: jsonl, path: texts.jsonl}", "distill.language_model={}")
PRETRAINED = (
    "student={path: somewhere, architecture: null, sft: null}",
    "tokenizer={type: pretrained, path: somewhere}",
)


def _mixture(name: str) -> str:
    source = "{type: embedded, split: train, num_examples: 9, seed: 1}"
    return f"data.prompts={{type: mixture, sources: {{{name}: {{weight: 1, source: {source}}}}}}}"


CASES = {
    "weigh without weights": (
        (AHEAD, f"{STALENESS}.too_old=weigh"),
        (AHEAD, f"{STALENESS}.too_old=weigh", f"{STALENESS}.importance=token"),
        "too_old=weigh learns .* expected importance=token or importance=state, got none",
    ),
    "nothing is late where everything is waited for": (
        (f"{STALENESS}.importance=token",),
        (AHEAD, f"{STALENESS}.importance=token"),
        r"max_staleness=0 waits for everything.*got \('wait', 'token', 1.0, None\)",
    ),
    "tokens of the next step": (
        (AHEAD, f"{STALENESS}.tokens_per_step=100"),
        (AHEAD, f"{STALENESS}.tokens_per_step=100", f"{STALENESS}.too_old=reissue"),
        "tokens_per_step takes in .* expected too_old=reissue or too_old=weigh",
    ),
    "a share where late sequences are waited for": (
        (AHEAD, f"{STALENESS}.min_on_policy_share=0.5"),
        (AHEAD, f"{STALENESS}.min_on_policy_share=0.5", f"{STALENESS}.too_old=reissue"),
        "min_on_policy_share lets a step go on .* expected too_old=reissue or too_old=weigh",
    ),
    "an evaluation between two measurements": (
        ("distill.measure_every=20", "distill.evaluate_every=30"),
        ("distill.measure_every=20", "distill.evaluate_every=40"),
        "evaluate_every must be a multiple of measure_every, got 30 and 20",
    ),
    "no prompts for the student": (
        ("distill.student_prompts_per_step=0",),
        ("distill.student_prompts_per_step=0", "distill.objective.on_policy_weight=0"),
        "reads the on_policy stream: expected student_prompts_per_step > 0",
    ),
    "no prompts for the teacher": (
        ("distill.teacher_prompts_per_step=0",),
        ("distill.teacher_prompts_per_step=0", "distill.objective.on_policy_weight=1"),
        "reads the off_policy stream: expected teacher_prompts_per_step > 0",
    ),
    "replay that runs ahead": (
        ("distill.replay={}", "distill.off_policy_source=dataset", AHEAD),
        ("distill.replay={}", "distill.off_policy_source=dataset"),
        "the streams may not run ahead: expected staleness.max_staleness=0, got 2",
    ),
    "replay of the teacher's text": (
        ("distill.replay={}",),
        ("distill.replay={}", "distill.off_policy_source=dataset"),
        "off_policy_source=dataset, got objective.type=ammd, off_policy_source=teacher",
    ),
    "learner ranks that share a GPU": (
        (*SHARED, "pools.learner.count=2"),
        (*SHARED, "pools.learner.count=1"),
        "meet over NCCL, which wants a GPU of its own for each: .* got 0.5",
    ),
    "a learner rank of two GPUs": (
        ("pools.learner.gpus=2", "pools.student_rollout.gpus=1"),
        ("pools.learner.gpus=1", "pools.student_rollout.gpus=1"),
        "expected learner.gpus of at most 1, got 2",
    ),
    "vLLM on a GPU and a learner on none": (
        ("pools.student_rollout.gpus=1",),
        ("pools.student_rollout.gpus=1", "rollout.engine=transformers"),
        "learner and student_rollout must both have GPUs or both have none where vLLM",
    ),
    "transformers on two GPUs": (
        ("rollout.engine=transformers", "pools.teacher_rollout.gpus=2"),
        ("rollout.engine=transformers", "pools.teacher_rollout.gpus=1"),
        "expected pools.teacher_rollout.gpus of at most 1, got 2",
    ),
    "transformers that sleeps": (
        (*ASLEEP, "rollout.engine=transformers"),
        (*ASLEEP, "rollout.engine=vllm"),
        "rollout.teacher_engine.sleep_when_idle is vLLM's: expected false",
    ),
    "a sleeping student": (
        ("rollout.student_engine.sleep_when_idle=true",),
        ("rollout.student_engine.sleep_when_idle=false",),
        "new weights come while the student's engine is idle",
    ),
    "a sleeping teacher on a CPU": (
        ("rollout.teacher_engine.sleep_when_idle=true",),
        ("rollout.teacher_engine.sleep_when_idle=true", "pools.teacher_rollout.gpus=1"),
        "no sleep on a CPU: expected pools.teacher_rollout.gpus > 0",
    ),
    "rows that are not there": (
        (*PRETRAINED, "distill.off_policy_source=dataset", "data.student_sft=null"),
        (*PRETRAINED, "distill.off_policy_source=dataset"),
        "off_policy_source=dataset needs rows: give data.student_sft",
    ),
    "fine-tuning without rows": (
        ("data.teacher_sft=null",),
        ("data.teacher_sft.num_examples=100",),
        r"teacher\.sft needs rows: give data\.teacher_sft",
    ),
    "a store that is not there": (
        ("distill.off_policy_source=store",),
        ("distill.off_policy_source=store", "data.trajectory_store=somewhere"),
        "off_policy_source=store needs samples: give data.trajectory_store",
    ),
    "a prompt and its response longer than the model": (
        ("data.max_prompt_tokens=105",),
        ("data.max_prompt_tokens=104",),
        r"teacher\.architecture\.max_position_embeddings must be at least .* = 129, got 128",
    ),
    "random weights without fine-tuning": (
        ("student.sft=null",),
        ("student.sft.steps=1",),
        "a model of random weights needs sft",
    ),
    "a model from both": (
        ("student.path=somewhere",),
        ("student.sft.steps=1",),
        "give exactly one of path .* and architecture",
    ),
    "heads that do not share the width": (
        ("student.architecture.num_heads=5",),
        ("student.architecture.num_heads=4",),
        "hidden_size must be a multiple of 2 x num_heads, got 64 and 5",
    ),
    "a tokenizer of nobody's": (
        ("tokenizer={type: pretrained}",),
        ("tokenizer={type: pretrained, path: somewhere}",),
        "no tokenizer of its own: give tokenizer.type=embedded or train_bpe",
    ),
    "a template without its prompt": (
        ("data.prompt_template=Q",),
        ("data.prompt_template='{prompt}'",),
        r"prompt_template must contain \{prompt\}, got 'Q'",
    ),
    "a mixture of nothing": (
        ("data.prompts={type: mixture, sources: {}}",),
        (_mixture("easy"),),
        "sources needs at least one source, .* got none",
    ),
    "a source with a slash": (
        (_mixture("a/b"),),
        (_mixture("a-b"),),
        r"sources needs at least one source, .* got \['a/b'\]",
    ),
    "lengths of answers that are not read": (
        ("data.prompts={type: jsonl, path: x.jsonl, max_response_tokens: 9}",),
        ("data.prompts={type: jsonl, path: x.jsonl}",),
        "prompts: answers are not read here",
    ),
    "a feature on a stream twice": (
        ("distill.objective.advantage={type: log_ratio, streams: [on_policy, on_policy]}",),
        ("distill.objective.advantage={type: log_ratio, streams: [on_policy, off_policy]}",),
        "streams must name off_policy, on_policy or both once",
    ),
    "a temperature for k probabilities": (
        (MATCHING + "off_policy: {type: top_k, k: 4}, temperature: 2.0}",),
        (MATCHING + "off_policy: {type: top_k, k: 4}}",),
        "reads k of the teacher's probabilities",
    ),
    "a loss on no stream": (
        (MATCHING + "on_policy: null}",),
        (MATCHING + "on_policy: {type: reverse_kl}}",),
        "give off_policy, on_policy or both, got neither",
    ),
    "no weight for the only loss": (
        (MATCHING + "off_policy: {type: forward_kl}, on_policy_weight: 1.0}",),
        (MATCHING + "off_policy: {type: forward_kl}, on_policy_weight: 0.0}",),
        "on_policy_weight=1.0 gives off_policy no weight",
    ),
    "two lengths of warm-up": (
        ("distill.optimizer.warmup_steps=9", "distill.optimizer.warmup_ratio=0.1"),
        ("distill.optimizer.warmup_steps=null", "distill.optimizer.warmup_ratio=0.1"),
        "expected warmup_steps or warmup_ratio, got both: 9 and 0.1",
    ),
    "an end by what nobody measures": (
        ("distill.early_stopping={metric: held_out/cross_entrop, mode: min, patience: 2}",),
        ("distill.early_stopping={metric: held_out/cross_entropy, mode: min, patience: 2}",),
        r"early_stopping\.metric: this run measures no 'held_out/cross_entrop'; did you mean 'held",
    ),
    "the best by nothing": (
        ("export.weights=best",),
        ("export.weights=best", "distill.keep_best={metric: held_out/cross_entropy, mode: min}"),
        "nothing says by which metric it is best: give distill.keep_best",
    ),
    "fewer sequences than ranks": (
        ("pools.learner.count=3", "distill.student_prompts_per_step=2"),
        ("pools.learner.count=3", "distill.student_prompts_per_step=3"),
        "on_policy stream must have at least pools.learner.count=3 sequences",
    ),
    "a loss on text that is not given": (
        ("distill.language_model={weight: 1}",),
        ("distill.language_model={weight: 0}",),
        "distill.language_model needs text: give data.plain_text",
    ),
    "fewer texts than ranks": (
        (*TEXT, "pools.learner.count=3", "distill.language_model.sequences_per_step=2"),
        (*TEXT, "pools.learner.count=3", "distill.language_model.sequences_per_step=3"),
        "distill.language_model.sequences_per_step must be at least pools.learner.count=3",
    ),
    "pairs of data for an objective that knows none": (
        ("distill.off_policy_source=preferences", OF_ROWS[2]),
        OF_ROWS,
        "off_policy_source=preferences brings pairs: expected objective=",
    ),
    "pairs that are not given": (OF_ROWS[:2], OF_ROWS, "needs pairs: give data.preferences"),
    "the better answers from elsewhere": (
        (*PREFER, "distill.off_policy_source=dataset"),
        PREFER,
        "reads one source: expected off_policy_source=teacher, got dataset",
    ),
    "a pair with one half": (
        (*PREFER, "distill.teacher_prompts_per_step=8"),
        (*PREFER, "distill.teacher_prompts_per_step=8", "distill.student_prompts_per_step=8"),
        "expected teacher_prompts_per_step=64, as many as the student's, got 8",
    ),
    "half a pair": (
        (*OF_ROWS, "distill.teacher_prompts_per_step=7"),
        (*OF_ROWS, "distill.teacher_prompts_per_step=6"),
        "expected an even sum of .* got 71",
    ),
    "pairs that age": ((*OF_ROWS, AHEAD), OF_ROWS, "expected staleness.max_staleness=0, got 2"),
    "answers to a prompt in two steps": (
        (*PREFER, AHEAD, f"{STALENESS}.too_old=reissue"),
        (*PREFER, AHEAD),
        "expected staleness.too_old=wait and importance=none, got reissue and none",
    ),
    "pairs of which one half may be left out": (
        (*OF_ROWS, "data.preferences.leave_out_empty=true"),
        (*OF_ROWS, "data.preferences.max_response_tokens=9"),
        "preferences: leave_out_empty and leave_out_refused would leave out one half",
    ),
    "texts by the length of answers that they have not": (
        (*TEXT, "data.plain_text.max_response_tokens=9"),
        (*TEXT, "data.plain_text.max_prompt_tokens=9"),
        "plain_text: answers are not read here",
    ),
}


@pytest.mark.parametrize(("refused", "taken", "said"), CASES.values(), ids=CASES)
def test_a_contradiction_is_refused_and_its_neighbour_is_taken(
    refused: tuple[str, ...], taken: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config([QUICKSTART], refused)
    load_config([QUICKSTART], taken)
