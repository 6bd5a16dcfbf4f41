from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.config import RunConfig, dump_config, load_config
from distill_system.config.data import EmbeddedSource, JsonlSource, MessagesFields
from distill_system.config.objective import AmmdConfig
from distill_system.config.objective.ammd import ClosedFormCritic, CriticConfig, GradientCritic
from distill_system.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]

COMPLETE = """\
name: example
tokenizer: {type: embedded}
data:
  max_prompt_tokens: 64
  teacher_sft: {type: embedded, split: train, num_examples: 80}
  student_sft: {type: embedded, split: train, num_examples: 40}
  prompts: {type: embedded, split: train, num_examples: 40, seed: 7}
  held_out: {type: embedded, split: in_distribution, num_examples: 10}
  evaluation:
    in_distribution: {type: embedded, split: in_distribution, num_examples: 10}
teacher:
  architecture: {hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2}
  sft: {steps: 3, optimizer: {learning_rate: 1e-3}}
student:
  architecture: {hidden_size: 8, intermediate_size: 16, num_layers: 1, num_heads: 2}
  sft: {steps: 3, optimizer: {learning_rate: 1e-3}}
rollout:
  sampling: {max_response_tokens: 16}
distill:
  steps: 5
  optimizer:
    type: muon
    learning_rate: 3e-4
"""


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    return _write(tmp_path / "complete.yaml", COMPLETE)


def _critic(config: RunConfig) -> CriticConfig:
    assert isinstance(config.distill.objective, AmmdConfig)
    return config.distill.objective.critic


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _message(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(paths, overrides)
    return str(raised.value)


def test_a_complete_file_loads_with_defaults_filled_in(complete: Path) -> None:
    config = load_config([complete])
    assert config.distill.optimizer.learning_rate == 3e-4
    assert config.data.prompts == EmbeddedSource(
        type="embedded", split="train", num_examples=40, seed=7
    )
    assert _critic(config) == ClosedFormCritic()
    assert config.pools.learner.count == 1


def test_later_files_change_only_what_they_name(complete: Path, tmp_path: Path) -> None:
    top = _write(tmp_path / "top.yaml", "distill: {optimizer: {learning_rate: 1}}\nseed: 3\n")
    config = load_config([complete, top])
    assert (config.seed, config.distill.steps) == (3, 5)
    assert (config.distill.optimizer.type, config.distill.optimizer.learning_rate) == ("muon", 1.0)


def test_lists_are_replaced_and_not_joined(complete: Path, tmp_path: Path) -> None:
    first = _write(tmp_path / "first.yaml", "evaluation: {metrics: [exact_match, rouge_l]}")
    second = _write(tmp_path / "second.yaml", "evaluation: {metrics: [bleu]}")
    assert load_config([complete, first, second]).evaluation.metrics == ("bleu",)


def test_another_alternative_of_a_union_replaces_the_whole_mapping(
    complete: Path, tmp_path: Path
) -> None:
    top = _write(tmp_path / "top.yaml", "data: {prompts: {type: jsonl, path: rows.jsonl}}")
    assert load_config([complete, top]).data.prompts == JsonlSource(type="jsonl", path="rows.jsonl")


def test_the_same_alternative_of_a_union_is_merged(complete: Path, tmp_path: Path) -> None:
    top = _write(tmp_path / "top.yaml", "data: {prompts: {type: embedded, num_examples: 9}}")
    source = load_config([complete, top]).data.prompts
    assert isinstance(source, EmbeddedSource)
    assert (source.num_examples, source.seed) == (9, 7)


def test_an_alternative_that_the_default_chose_is_replaced_too(
    complete: Path, tmp_path: Path
) -> None:
    low = _write(tmp_path / "low.yaml", "distill: {objective: {critic: {ball: spectral}}}")
    top = _write(tmp_path / "top.yaml", "distill: {objective: {critic: {type: gradient_ascent}}}")
    assert _critic(load_config([complete, low])) == ClosedFormCritic()
    critic = _critic(load_config([complete, low, top]))
    assert critic == GradientCritic(type="gradient_ascent")  # whose own default is frobenius


def test_a_type_that_chooses_no_alternative_keeps_its_neighbours(complete: Path) -> None:
    optimizer = load_config([complete], ["distill.optimizer.type=adamw"]).distill.optimizer
    assert (optimizer.type, optimizer.learning_rate) == ("adamw", 3e-4)


def test_overrides_are_yaml_and_win_over_files(complete: Path) -> None:
    config = load_config(
        [complete],
        [
            "distill.steps=7",
            "distill.optimizer.adam_betas=[0, 0.5]",
            "teacher.sft.optimizer.learning_rate=1e-4",
            "data.prompt_template='{prompt} ='",
            "distill.evaluate_every=null",
            "data.evaluation.new={type: jsonl, path: x, fields: {format: messages}}",
            "runs_directory=off",
        ],
    )
    assert config.distill.steps == 7
    assert config.distill.optimizer.adam_betas == (0.0, 0.5)
    assert config.teacher.sft is not None
    assert config.teacher.sft.optimizer.learning_rate == 1e-4
    assert config.data.prompt_template == "{prompt} ="
    assert config.distill.evaluate_every is None
    assert list(config.data.evaluation) == ["in_distribution", "new"]
    new = config.data.evaluation["new"]
    assert isinstance(new, JsonlSource)
    assert new.fields == MessagesFields()
    assert config.runs_directory == "off"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_of_overrides_of_different_keys_does_not_matter(
    complete: Path, order: tuple[int, int]
) -> None:
    overrides = ["data.prompts.type=jsonl", "data.prompts.path=rows.jsonl"]
    config = load_config([complete], [overrides[i] for i in order])
    assert config.data.prompts == JsonlSource(type="jsonl", path="rows.jsonl")


def test_of_two_overrides_of_one_key_the_later_wins(complete: Path) -> None:
    assert load_config([complete], ["seed=1", "seed=2"]).seed == 2


@settings(max_examples=40)  # a busy machine is no failure
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50),
    st.floats(min_value=1e-300, max_value=1e300),
)
def test_a_dumped_configuration_loads_unchanged(
    tmp_path_factory: pytest.TempPathFactory, text: str, rate: float
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    first = load_config([_write(folder / "a.yaml", COMPLETE)])
    changed = first.model_copy(
        update={
            "runs_directory": f"runs{text}",  # a leading ~ would be the home folder
            "data": first.data.model_copy(update={"prompt_template": "{prompt}" + text}),
            "distill": first.distill.model_copy(
                update={
                    "optimizer": first.distill.optimizer.model_copy(update={"learning_rate": rate})
                }
            ),
        }
    )
    assert load_config([_write(folder / "b.json", dump_config(changed))]) == changed


def test_all_problems_are_told_at_once_without_pydantic_noise(
    complete: Path, tmp_path: Path
) -> None:
    top = _write(tmp_path / "top.yaml", "seed: many\n\ndistill:\n  step: 3\n  steps: 0\n")
    message = _message(complete, top, overrides=("scoring.threads=1.5",))
    assert message.splitlines() == [
        "the configuration has 4 problems:",
        f"  seed ({top}:1): expected a whole number >= 0, got 'many'",
        "  scoring.threads (override 'scoring.threads=1.5'): expected a whole number > 0, got 1.5",
        f"  distill.steps ({top}:5): expected a whole number > 0, got 0",
        f"  distill.step ({top}:4): unknown key; did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.prompts.splitt=train", "unknown key; did you mean 'split'?"),
        ("data.prompts.zzz=1", "unknown key; valid keys here: type, split, num_examples, seed"),
        (
            "data.prompts.type=jsnl",
            "expected 'embedded', 'files', 'jsonl', 'parquet', 'datasets' or 'mixture', got 'j",
        ),
        ("data.prompts.type=jsnl", "did you mean 'jsonl'?"),
        ("data.prompts.split=tran", "expected 'train', 'in_distribution', 'paraphrase'"),
        ("data.prompts=rows.jsonl", "expected a mapping with type 'embedded', 'files', 'jsonl'"),
        ("data.prompts.type=jsonl", "data.prompts.path: missing; expected text; add it to the"),
        ("data.evaluation.b.seed=x", "data.evaluation.b.path: missing; expected text, or a list"),
        ("data.evaluation.b.seed=x", "data.evaluation.b.seed (override"),
        (
            "data.evaluation.../b={path: x}",
            "override 'data.evaluation.../b={path: x}': expected key",
        ),
        ("data.evaluation={../b: {path: x}}", "must be named by letters, digits, '.', '_' and '-'"),
        ("name=7", "name (override 'name=7'): expected text, got 7; put it in quotes"),
        ("name=a/b", "name must be letters, digits"),
        ("data.prompt_template=x", "prompt_template must contain {prompt}, got 'x'"),
        ("rollout=null", "expected a mapping with the keys engine, sampling, student_eng"),
        ("learner.threads=true", "expected a whole number > 0, got true"),
        ("data.use_chat_template=yes", "expected true or false, got 'yes'"),
        ("data.teacher_sft.num_examples=null", "expected a whole number > 0, got null"),
        ("distill.evaluate_every=0", "expected a whole number > 0, or 'epoch' or null, got 0"),
        (
            "learner.shard_ranks=0",
            "has 1 problem:\n  learner.shard_ranks (override 'learner.shard_ranks=0'): expected a "
            "whole number > 0, or 'all', got 0",
        ),
        (
            "distill.keep_best={metric: loss, mode: min}",
            "expected the name of a metric that begins",
        ),
        ("distill.early_stopping={metric: loss, mode: min, patience: 1}", "held_out/cross_entropy"),
        (
            "distill.optimizer.schedule=cosin",
            "expected 'cosine', 'linear', 'constant' or 'warmup_st",
        ),
        (
            "distill.optimizer.warmup_ratio=0.6",
            "expected a number >= 0 and <= 0.5 or null, got 0.6",
        ),
        ("distill.optimizer.learning_rate=.inf", "expected a number > 0, got Infinity; it must be"),
        ("distill.optimizer.learning_rate=.nan", "expected a number > 0, got NaN; it must be"),
        ("distill.optimizer.adam_betas=[0.9]", "expected a list of 2, each a number >= 0 and < 1"),
        ("distill.optimizer.adam_betas=[0, 1]", "adam_betas[1] (override"),
        ("distill.optimizer.adam_betas.0=1", 'got {"0": 1}'),
        ("evaluation.metrics=[bleu, rouge]", "evaluation.metrics[1] (override 'evaluation.metrics"),
        ("seed.deep=1", 'expected a whole number >= 0, got {"deep": 1}'),
        ("pools.learner.custom_resources.fast=-1", "custom_resources.fast (override"),
        ("distill.objective.critic.radius=0", "distill.objective.critic.radius (override"),
        ("pools.learner.gpus=1", "learner and student_rollout must both have GPUs"),
        ("student.path=x", "give exactly one of path (a pretrained model) and architecture"),
        ("data.student_sft=null", "student.sft needs rows: give data.student_sft"),
    ],
)
def test_each_problem_says_what_was_expected(complete: Path, override: str, said: str) -> None:
    message = _message(complete, overrides=(override,))
    assert said in message
    assert "pydantic" not in message
    assert "input_value" not in message


def test_a_key_below_one_with_a_default_type_takes_that_type(complete: Path) -> None:
    config = load_config([complete], ["distill.objective.critic.radius=2"])
    assert _critic(config) == ClosedFormCritic(radius=2.0)


def test_a_missing_key_names_the_mapping_it_belongs_to(complete: Path, tmp_path: Path) -> None:
    text = complete.read_text().replace("    learning_rate: 3e-4\n", "").replace("name: ex", "#")
    path = _write(tmp_path / "incomplete.yaml", text)
    line = text.splitlines().index("  optimizer:") + 1
    assert _message(path).splitlines() == [
        "the configuration has 2 problems:",
        f"  name: missing; expected text; add it to the mapping at {path}, or give name=VALUE",
        "  distill.optimizer.learning_rate: missing; expected a number > 0; add it to the mapping "
        f"at {path}:{line}, or give distill.optimizer.learning_rate=VALUE",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "override 'seed': expected key.sub=value"),
        ("=3", "override '=3': expected key.sub=value"),
        ("a..b=3", "override 'a..b=3': expected key.sub=value"),
        ("seed=", "override 'seed=': expected a value after '='; write seed=null for none"),
        ("seed=[1", "override 'seed=[1': not valid YAML"),
        ("data={a: 1, a: 2}", "override 'data={a: 1, a: 2}': the key 'a' already stands"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(
    complete: Path, override: str, said: str
) -> None:
    assert said in _message(complete, overrides=(override,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping of keys to values, got an empty file"),
        ("# only this\n", "got an empty file"),
        ("- 1\n- 2\n", "expected a mapping of keys to values at the top, got [1, 2]"),
        ("name: a\nname: b\n", ":2: the key 'name' already stands in this mapping at"),
        ("name: [a\n", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = _write(tmp_path / "run.yaml", text)
    message = _message(path)
    assert said in message
    assert str(path) in message


def test_a_file_that_is_not_there_names_its_nearest_neighbour(complete: Path) -> None:
    missing = complete.with_name("complet.yaml")
    message = _message(missing)
    assert f"{missing}: no such configuration file" in message
    assert f"did you mean {complete}?" in message


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert f"{tmp_path}: expected a YAML file, got a folder" in _message(tmp_path)


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\n")
    assert f"{path}: expected UTF-8 text" in _message(path)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("runs_directory=~/runs", lambda c: c.runs_directory),
        ("data.directory=~/data", lambda c: c.data.directory),
        ("data.held_out={type: jsonl, path: ~/x.jsonl}", lambda c: c.data.held_out.path),
        ("data.held_out={type: parquet, path: ~/x}", lambda c: c.data.held_out.path),
        ("data.held_out={type: datasets, name: ~/x}", lambda c: c.data.held_out.name),
        ("data.trajectory_store=~/store", lambda c: c.data.trajectory_store),
        ("student={path: ~/student, architecture: null, sft: null}", lambda c: c.student.path),
        ("tokenizer={type: pretrained, path: ~/tokenizer}", lambda c: c.tokenizer.path),
    ],
)
def test_a_tilde_is_the_home_folder_wherever_a_path_may_stand(
    complete: Path, monkeypatch: pytest.MonkeyPatch, override: str, read: Callable[[RunConfig], str]
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    tokenizer = "tokenizer={type: pretrained, path: somewhere}"
    overrides = [override] if "tokenizer" in override else [tokenizer, override]
    assert read(load_config([complete], overrides)).startswith("/home/somebody/")


def test_only_a_leading_tilde_is_a_home_folder(complete: Path) -> None:
    assert load_config([complete], ["runs_directory=a/~/b~"]).runs_directory == "a/~/b~"
    message = _message(complete, overrides=("runs_directory=~nobody_here/runs",))
    assert "runs_directory (override" in message
    assert "this machine knows none of '~nobody_here'" in message


def test_an_evaluation_at_every_epoch_comes_as_a_pass_over_the_prompts_ends(complete: Path) -> None:
    """40 prompts, 12 of them a step: the passes end within the steps 4, 7 and 10."""
    every = ("distill.evaluate_every=epoch", "distill.student_prompts_per_step=12")
    distill = load_config([complete], every).distill
    due = [done for done in range(1, 11) if distill.evaluates_after(done, num_prompts=40)]
    assert due == [4, 7, 10]
    alone = ("distill.objective.on_policy_weight=0", "distill.teacher_prompts_per_step=8")
    distill = load_config([complete], (*every, *alone)).distill
    due = [done for done in range(1, 11) if distill.evaluates_after(done, num_prompts=40)]
    assert due == [2, 4, 6, 8, 10], "the teacher takes 12 + 8 a step"


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), "float32"),
        (("learner.compute_dtype=bfloat16",), "bfloat16"),
        (("rollout.student_engine.dtype=bfloat16",), "bfloat16"),
        (("rollout.teacher_engine.dtype=bfloat16", "scoring.dtype=bfloat16"), "float32"),
        (("learner.compute_dtype=bfloat16", "export.dtype=float32"), "float32"),
        (("export.dtype=bfloat16",), "bfloat16"),
    ],
)
def test_the_export_is_in_the_precision_that_the_student_was_run_in(
    complete: Path, overrides: tuple[str, ...], dtype: str
) -> None:
    assert load_config([complete], overrides).export_dtype == dtype


def test_no_file_at_all_is_refused() -> None:
    assert "expected at least one YAML file, got none" in _message()


def test_every_configuration_of_the_repository_loads() -> None:
    """What has no name is a layer over the quickstart, or over what its line `# Run:` says; for
    paper/ see its own test file."""
    configs = REPOSITORY / "configs"
    quickstart = configs / "quickstart.yaml"
    found = sorted(configs.rglob("*.yaml"))
    assert quickstart in found
    for path in found:
        text = path.read_text(encoding="utf-8")
        told = re.search(r"^# Run: distill-system train (configs/\w+\.yaml)", text, re.MULTILINE)
        base = quickstart if told is None else REPOSITORY / told[1]
        layers = [path] if "\nname:" in f"\n{text}" else [base, path]
        if path.parent.name != "paper":
            assert isinstance(load_config(layers), RunConfig)
