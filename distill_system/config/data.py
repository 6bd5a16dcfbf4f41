"""Configuration of data: sources of prompts and answers, how a row becomes text, tokenizers."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from distill_system.config.base import ConfigModel, LocalPath
from distill_system.config.templates import template_fields

_SPLIT_NAME = r"\w[\w.-]{0,99}"


class PromptResponseFields(ConfigModel):
    """Rows with one field for the prompt and, optionally, one for the answer."""

    format: Literal["prompt_response"] = "prompt_response"
    prompt: str = "prompt"
    """Field that holds the prompt: a text, or a chat."""
    response: str | None = "response"
    """Field that holds the answer (a text, or a list of accepted texts); null for prompts alone."""


class InstructionFields(ConfigModel):
    """Rows with an instruction, an optional input it applies to, and an output."""

    format: Literal["instruction"] = "instruction"
    instruction: str = "instruction"
    """Field that holds the instruction."""
    input: str | None = "input"
    """Field that holds the input, which may be empty; null if there is none."""
    output: str | None = "output"
    """Field that holds the answer; null for prompts alone."""
    template: str = "{instruction}"
    """The prompt of a row without input, made of {instruction}."""
    template_with_input: str = "{instruction}\n\n{input}"
    """The prompt of a row with an input, made of {instruction} and {input}."""

    @model_validator(mode="after")
    def _check_templates(self) -> InstructionFields:
        expected = {"template": {"instruction"}, "template_with_input": {"instruction", "input"}}
        for key, names in expected.items():
            text: str = getattr(self, key)
            if set(template_fields(text)) != names:
                wanted = " and ".join(f"{{{name}}}" for name in sorted(names, reverse=True))
                raise ValueError(f"{key} must contain {wanted} and no other field, got {text!r}")
        return self


class MessagesFields(ConfigModel):
    """Rows with a chat: a list of {role, content}; rendered by the tokenizer's chat template."""

    format: Literal["messages"] = "messages"
    messages: str = "messages"
    """Field that holds the chat. A last message of role assistant is the answer."""
    tools: str | None = "tools"
    """Field that holds the tools the model may call, a list of JSON schemas; a row without it has
    none. null: tools are not read."""
    assistant_turns: Literal["last", "all"] = "last"
    """What of a chat is learned or asked: its last assistant turn, or each of them as a row of its
    own, after the conversation up to it."""


class ShareGptFields(ConfigModel):
    """Rows with a chat in the form of ShareGPT: a list of {from, value}."""

    format: Literal["sharegpt"] = "sharegpt"
    conversations: str = "conversations"
    """Field that holds the chat; human and gpt stand for user and assistant. A last message of gpt
    is the answer."""


class PreferenceFields(ConfigModel):
    """Rows with a preferred and a rejected answer; the preferred one is the answer."""

    format: Literal["preference"] = "preference"
    prompt: str | None = "prompt"
    """Field that holds the prompt, a text or a chat; null where the preferred chat begins with
    it."""
    chosen: str = "chosen"
    """Field that holds the preferred answer: a text, or a chat with or without its prompt."""
    rejected: str = "rejected"
    """Field that holds the other answer; data.preferences alone reads it."""


class TemplateFields(ConfigModel):
    """Rows of any fields; prompt and answer are templates in which {name} stands for a field.

    {outer.inner} names a nested field, as outer.inner does in every format. Texts are inserted
    unchanged, true and false as yes and no, whole numbers by their digits, lists of texts joined by
    spaces; {{ and }} are braces.
    """

    format: Literal["template"]
    prompt: str
    """The prompt, for example "Question: {question}\\nAnswer:"."""
    response: str | None = None
    """The answer that is learned from; null for prompts alone."""
    reference: str | None = None
    """What a response is scored against; null takes response."""

    @field_validator("prompt", "response", "reference")
    @classmethod
    def _check_template(cls, text: str | None) -> str | None:
        if text is not None and not template_fields(text):
            raise ValueError(
                f"a template must name at least one {{field}} of the row, got {text!r}"
            )
        return text


FieldMap = Annotated[
    PromptResponseFields
    | InstructionFields
    | MessagesFields
    | ShareGptFields
    | PreferenceFields
    | TemplateFields,
    Field(discriminator="format"),
]

EmbeddedSplit = Literal[
    "train", "in_distribution", "paraphrase", "longer_input", "composition", "distractor"
]


class EmbeddedSource(ConfigModel):
    """Short instruction-following tasks, made by a generator in the package."""

    type: Literal["embedded"]
    split: EmbeddedSplit
    """train, in_distribution, or one of four out-of-distribution splits."""
    num_examples: PositiveInt
    """How many examples to make."""
    seed: NonNegativeInt = 0
    """Seed of the generator; the same seed gives the same examples."""


class RowSource(ConfigModel):
    """Keys of all sources that read the rows of a file or data set."""

    fields: FieldMap | None = None
    """Which fields hold the prompt and the answer; null finds them by their usual names, and the
    run says which."""
    skip: NonNegativeInt = 0
    """Rows left out at the start."""
    num_examples: PositiveInt | None = None
    """Rows read after those; null reads all."""
    leave_out_empty: bool = False
    """Leave out rows whose prompt or answer is empty, before num_examples are counted; without it
    such a row ends the run."""
    leave_out_refused: bool = False
    """Leave out rows that cannot be used, whatever the reason, before num_examples are counted; the
    run says how many and why. Without it such a row ends the run."""
    max_prompt_tokens: PositiveInt | None = None
    """Leave out rows of a longer prompt, after num_examples were read; null leaves none out, and a
    prompt longer than data.max_prompt_tokens ends the run."""
    min_response_tokens: PositiveInt | None = None
    """Leave out rows of a shorter answer (the first accepted one, without its end token)."""
    max_response_tokens: PositiveInt | None = None
    """Leave out rows of a longer answer."""

    @property
    def bounds_responses(self) -> bool:
        """Whether some rows are left out because of the length of their answers."""
        return self.min_response_tokens is not None or self.max_response_tokens is not None


FileFormat = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow"]


class FilesSource(RowSource):
    """A file, a folder of files, or a pattern: JSON, JSONL, CSV, TSV (all plain or gzipped),
    parquet, Arrow, or a folder that `datasets` saved."""

    type: Literal["files"] = "files"
    path: LocalPath | tuple[LocalPath, ...]
    """A file, a folder, a pattern such as part-*.jsonl, or a list of them; a relative path is taken
    from data.directory."""
    format: FileFormat | None = None
    """Form of the files; null goes by their endings."""
    split: str | None = None
    """Which split to read, where the files are of several: train-*.jsonl beside test-*.jsonl, or a
    JSON file of {"train": [...], "test": [...]}."""


class JsonlSource(RowSource):
    """A file of one JSON object a line, plain or gzipped."""

    type: Literal["jsonl"]
    path: LocalPath
    """The file; a relative path is taken from data.directory."""


class ParquetSource(RowSource):
    """A parquet file."""

    type: Literal["parquet"]
    path: LocalPath
    """The file; a relative path is taken from data.directory."""


class DatasetsSource(RowSource):
    """A data set by its name on the Hugging Face hub, or a folder that `datasets` can load or has
    saved (save_to_disk)."""

    type: Literal["datasets"]
    name: LocalPath
    """Name or path given to datasets.load_dataset."""
    subset: str | None = None
    """Name of the configuration, where the data set has several."""
    split: str = "train"
    """Which split to read."""
    folder: str | None = None
    """Folder inside the data set that holds the files, where they are of several kinds."""
    revision: str | None = None
    """Branch, tag or commit of the hub; null takes its main branch."""


Source = Annotated[
    EmbeddedSource | FilesSource | JsonlSource | ParquetSource | DatasetsSource,
    Field(discriminator="type"),
]


RowFileSource = Annotated[
    FilesSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="type")
]


class WeightedSource(ConfigModel):
    """One source of a mixture."""

    source: Source
    """What is read."""
    weight: PositiveFloat = 1.0
    """Prompts taken from it for each prompt from a source of weight 1."""
    held_out: Source | None = None
    """Rows of it with answers that nothing is learned from, which the mixture's policy measures
    on."""


class TeacherGapConfig(ConfigModel):
    """Weights that grow where the student is behind its teacher: DDK (arXiv 2407.16154). Every
    `every` steps a weight is multiplied by e to the power of the ratio of the student's perplexity
    to the teacher's on the source's held_out rows; then the weights are scaled to sum to 1."""

    type: Literal["teacher_gap"] = "teacher_gap"
    every: PositiveInt = 1000
    """Steps between two measurements."""
    smoothing: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """a: of N sources none has less than (1 - a) / N of the prompts, once the weights have moved
    for the first time."""
    cap: PositiveFloat = 5.0
    """Largest ratio that counts: a source that stays behind grows by e to this power each time."""


class MixtureSource(ConfigModel):
    """Sources that take turns in proportion to their weights; each has epochs of its own."""

    type: Literal["mixture"]
    sources: dict[str, WeightedSource]
    """Sources by name; the ids of their prompts contain it."""
    policy: TeacherGapConfig | None = None
    """How the weights follow measurements; null: they stay as they are written."""

    @field_validator("sources")
    @classmethod
    def _check(cls, sources: dict[str, WeightedSource]) -> dict[str, WeightedSource]:
        wrong = [name for name in sources if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]
        if wrong or not sources:
            raise ValueError(
                "sources needs at least one source, each named by letters, digits, '_' and '-', "
                f"got {wrong or 'none'}"
            )
        return sources

    @model_validator(mode="after")
    def _check_policy(self) -> MixtureSource:
        measured = [name for name, each in self.sources.items() if each.held_out is not None]
        if self.policy is None:
            if measured:
                raise ValueError(
                    f"sources.{measured[0]}.held_out is read by a policy alone: give policy, such "
                    "as {type: teacher_gap}, or remove it"
                )
            return self
        weights = {each.weight for each in self.sources.values()}
        if len(measured) < len(self.sources) or weights != {1.0} or len(measured) < 2:
            raise ValueError(
                "policy measures the weights of two sources or more on rows of their own: expected "
                "held_out and no weight in each, got held_out in "
                f"{measured or 'none'} of {list(self.sources)} and the weights {sorted(weights)}"
            )
        return self


PromptSource = Annotated[
    EmbeddedSource | FilesSource | JsonlSource | ParquetSource | DatasetsSource | MixtureSource,
    Field(discriminator="type"),
]


class EmbeddedTokenizer(ConfigModel):
    """The closed word-level vocabulary of the embedded tasks."""

    type: Literal["embedded"]


class TrainedTokenizer(ConfigModel):
    """A byte-level BPE tokenizer trained on the teacher's supervised data as the run starts."""

    type: Literal["train_bpe"]
    vocab_size: Annotated[int, Field(ge=300)]
    """Number of tokens, special ones included; at least 300."""


class PretrainedTokenizer(ConfigModel):
    """An existing tokenizer, by default the teacher's."""

    type: Literal["pretrained"] = "pretrained"
    path: LocalPath | None = None
    """Folder or hub name; null takes the teacher's."""


TokenizerConfig = Annotated[
    EmbeddedTokenizer | TrainedTokenizer | PretrainedTokenizer, Field(discriminator="type")
]


_GIVEN_BY_THE_HOUSE = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
_ARGUMENTS_OF_TRANSFORMERS = {
    *("chat_template", "continue_final_message", "conversation", "max_length", "padding"),
    *("return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "truncation"),
    "tokenizer_kwargs",
}


def _check_chat_keys(
    values: dict[str, JsonValue], template: str | None, template_name: str | None
) -> None:
    taken = sorted(values.keys() & (_GIVEN_BY_THE_HOUSE | _ARGUMENTS_OF_TRANSFORMERS))
    if taken:
        raise ValueError(
            f"chat_template_kwargs must not hold {taken}: these are given with every rendering "
            "(the day is data.chat_date, tools are a field of the row)"
        )
    if template is not None and template_name is not None:
        raise ValueError("give chat_template or chat_template_name, not both")


class TeacherContextConfig(ConfigModel):
    """What the teacher reads before a prompt and the student does not (context distillation)."""

    text: str = ""
    """Instructions; {field} is a field of the row, such as its solution, and {{ and }} are braces.
    It begins the system message of a chat, and stands before a plain prompt as it is written. With
    fields the teacher is evaluated without context: the answer would stand before the prompt."""
    examples: Source | None = None
    """Rows with answers that stand behind text, all of them, so that num_examples is to be given;
    rows whose prompts are held out or evaluated are left out. In a chat they are turns."""
    separator: str = "\n\n"
    """Stands behind each example where the prompt is plain."""
    max_tokens: PositiveInt = 512
    """Most tokens that a prompt of the teacher may have beyond data.max_prompt_tokens."""
    fine_tuning: bool = False
    """Whether teacher.sft learns after the context too; its rows need the fields of text then."""

    @field_validator("text")
    @classmethod
    def _check_text(cls, text: str) -> str:
        template_fields(text)
        return text

    @model_validator(mode="after")
    def _check(self) -> TeacherContextConfig:
        if not self.text and self.examples is None:
            raise ValueError(
                "the teacher would read what the student reads: give text or examples, or set "
                "data.teacher_context=null"
            )
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that text names."""
        return template_fields(self.text)


class DataConfig(ConfigModel):
    """Every set of rows the run reads."""

    directory: LocalPath = "."
    """Folder that relative paths of the sources start from."""
    prompt_template: str = "{prompt}"
    """How a plain prompt becomes the text the models read; must contain {prompt}."""
    use_chat_template: bool = False
    """Send plain prompts as one user message through the tokenizer's chat template instead."""
    chat_template: str | None = None
    """A chat template in place of the tokenizer's own: a file (a relative path is taken from
    data.directory), or the Jinja text itself. It is kept with the run's tokenizer."""
    chat_template_name: str | None = None
    """Which template, where the tokenizer has several by name; null: as transformers chooses."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default={})
    """Further values that the chat template reads, for example {enable_thinking: false}."""
    chat_date: Annotated[date, Field(strict=False)] | None = None
    """The day that a chat template is told is today; null: the day on which the run began."""
    control_tokens_in_rows: Literal["text", "control"] = "text"
    """What a control token spelled in a row is: the characters that are written there, or the
    token, for rows that were rendered before. In templates it is always the token."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt; too_long_prompts says what becomes of a longer one."""
    too_long_prompts: Literal["refuse", "leave_out", "cut_left", "cut_right"] = "refuse"
    """A prompt longer than max_prompt_tokens ends the run, is left out with its row, or is cut at
    its beginning or its end: in the row's own text, what templates write stays whole. A chat loses
    its oldest messages before the beginning of its last one."""
    max_memory_mebibytes: PositiveInt = 1024
    """Most memory for the tokenised rows of a training set (data.prompts, data.teacher_sft,
    data.student_sft, data.preferences, data.plain_text); those of a larger one are written to a
    file and mapped from there."""
    cache_directory: LocalPath | None = None
    """Folder of that file, which is gone when the run ends; null takes that of `datasets`."""
    teacher_context: TeacherContextConfig | None = None
    """What the teacher reads before each prompt and the student does not; null: nothing."""
    teacher_sft: Source | None = None
    """Rows that the teacher is fine-tuned on."""
    student_sft: Source | None = None
    """Rows that the student is fine-tuned on before distillation."""
    preferences: RowFileSource | None = None
    """Rows with a preferred and a rejected answer, for distill.objective.type=preference."""
    plain_text: Source | None = None
    """Texts that distill.language_model learns from as they are, without a template: what a source
    of prompts reads as the prompt, such as a column named text. A text longer than
    data.max_prompt_tokens + rollout.sampling.max_response_tokens is read in pieces."""
    prompts: PromptSource
    """Prompts of the distillation, from one source or from a weighted mixture; answers are not
    read."""
    trajectory_store: LocalPath | None = None
    """Folder of samples that `distill-system generate` wrote ahead, for
    distill.off_policy_source=store; a relative path is taken from data.directory."""
    held_out: Source
    """Prompts on which both moment-matching distances are measured."""
    evaluation: dict[str, Source]
    """Named splits with reference answers; their prompts are removed from all training rows."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template must contain {{prompt}}, got {self.prompt_template!r}"
            )
        if not self.evaluation:
            raise ValueError("evaluation needs at least one named split")
        wrong = [name for name in self.evaluation if not re.fullmatch(_SPLIT_NAME, name)]
        if wrong:
            raise ValueError(
                "the splits of evaluation must be named by letters, digits, '.', '_' and '-', "
                f"beginning with a letter or digit, at most 100 of them, got {wrong}"
            )
        _check_chat_keys(self.chat_template_kwargs, self.chat_template, self.chat_template_name)
        pairs = self.preferences
        if pairs is not None and (pairs.leave_out_empty or pairs.leave_out_refused):
            raise ValueError(
                "preferences: leave_out_empty and leave_out_refused would leave out one half of a "
                "pair; remove such rows, and these keys"
            )
        unread = {**self.prompt_sources, "held_out": self.held_out, "plain_text": self.plain_text}
        for name, source in unread.items():
            if isinstance(source, RowSource) and source.bounds_responses:
                raise ValueError(
                    f"{name}: answers are not read here, so that min_response_tokens and "
                    "max_response_tokens have no meaning; remove them"
                )
        return self

    @property
    def sources(self) -> dict[str, Source]:
        """Every source of rows by its key in the configuration."""
        names = ("teacher_sft", "student_sft", "held_out", "preferences", "plain_text")
        single = {name: getattr(self, name) for name in names}
        named = {name: source for name, source in single.items() if source is not None}
        named |= {f"evaluation.{split}": source for split, source in self.evaluation.items()}
        named |= {**self.prompt_sources, **self.gap_sources}
        if self.teacher_context is not None and self.teacher_context.examples is not None:
            named["teacher_context.examples"] = self.teacher_context.examples
        return {f"data.{name}": each for name, each in named.items()}

    @property
    def source_policy(self) -> TeacherGapConfig | None:
        """How the weights of the prompts' sources follow measurements."""
        return self.prompts.policy if isinstance(self.prompts, MixtureSource) else None

    @property
    def gap_sources(self) -> dict[str, Source]:
        """What a policy of the prompts' sources measures on, by its key below `data`."""
        sources = self.prompts.sources if isinstance(self.prompts, MixtureSource) else {}
        return {
            f"prompts.sources.{name}.held_out": each.held_out
            for name, each in sources.items()
            if each.held_out is not None
        }

    @property
    def prompt_sources(self) -> dict[str, Source]:
        """The sources of the prompts by their key below `data`."""
        if not isinstance(self.prompts, MixtureSource):
            return {"prompts": self.prompts}
        return {
            f"prompts.sources.{name}.source": weighted.source
            for name, weighted in self.prompts.sources.items()
        }

    @property
    def prompt_weights(self) -> dict[str, float]:
        """The weights of those sources in the same order, by the name in their prompts' ids."""
        if not isinstance(self.prompts, MixtureSource):
            return {"prompts": 1.0}
        return {f"prompts.{name}": each.weight for name, each in self.prompts.sources.items()}
