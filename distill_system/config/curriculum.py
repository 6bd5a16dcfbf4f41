"""A run with a curriculum in, its stages out, each the configuration of an ordinary run.

A stage starts from what the stages before it left: their student, the teacher that they had, their
tokenizer. So it needs no code of its own in training, and its folder is a run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill_system.config.data import PretrainedTokenizer, TokenizerConfig
from distill_system.config.layers import check_tree, merge
from distill_system.config.model import ModelConfig
from distill_system.config.objective.token_losses import InterpolatedCrossEntropyConfig
from distill_system.config.run import RunConfig
from distill_system.config.schema import root_slot
from distill_system.config.yaml_tree import Located, to_plain
from distill_system.errors import ConfigError

OF_THE_WHOLE = ("curriculum", "runs_directory", "runs_mirror", "tokenizer")
"""Keys that no stage may have for itself."""
ROLES = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a curriculum.

    config: the run that it is. planned: the same run with models of the same shapes that exist
    before the first stage has run, to be checked and planned by.
    label_weight: folders of the two students that the weight of the labels follows from, fitted to
    labels alone and to the teacher alone; None where it stands in the configuration.
    """

    name: str
    config: RunConfig
    planned: RunConfig
    label_weight: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A model that a stage may start from: its path, and who has its shape already."""

    path: str
    stand_in: ModelConfig


def resolve_stages(tree: Located, config: RunConfig) -> tuple[Stage, ...]:
    """The stages of the run that a tree describes; config: the same run, checked.

    Raises: ConfigError that names the stage, the key, and where it was set.
    """
    if not config.curriculum:
        return ()
    assert isinstance(tree.value, dict), "a checked configuration is a mapping"
    base = Located({k: v for k, v in tree.value.items() if k != "curriculum"}, tree.where)
    layers = tree.value["curriculum"].value
    assert isinstance(layers, list), "it was checked with the configuration"
    making = _Making(base, config)
    for layer in layers:
        making.add(layer)
    return tuple(making.stages)


class _Making:
    """The stages so far, and the models that the next one may start from."""

    def __init__(self, base: Located, config: RunConfig) -> None:
        self.stages: list[Stage] = []
        self._base = base
        self._config = config
        self._folder = Path(config.runs_directory).absolute() / config.name
        self._students: dict[str, _Model] = {}  # by the stage that left it
        self._carried: dict[str, _Model] = {}  # by role; none before the first stage

    def add(self, layer: Located) -> None:
        """Make the next stage from what is written of it."""
        assert isinstance(layer.value, dict), "it was checked with the configuration"
        written = dict(layer.value)
        name = str(written.pop("name").value)
        try:
            self._refuse_keys(written)
            label_weight = self._fits(written.pop("label_weight", None))
            chosen = {role: self._choose(role, written) for role in ROLES}
            run = merge(
                self._start(name, chosen), Located(written, layer.where), root_slot(RunConfig)
            )
            config = check_tree(run)
            if label_weight is not None:
                _require_interpolation(config)
        except ConfigError as error:
            raise ConfigError(f"curriculum, stage {name!r}: {error}") from error
        stand_ins = {
            role: getattr(config, role) if model is None else _standing(model, config, role)
            for role, model in chosen.items()
        }
        planned = config.model_copy(update={**stand_ins, "tokenizer": self._tokenizer()})
        self.stages.append(
            Stage(name=name, config=config, planned=planned, label_weight=label_weight)
        )
        self._leave(name, config, stand_ins)

    def _refuse_keys(self, written: Mapping[str, Located]) -> None:
        for key in OF_THE_WHOLE:
            if key in written:
                raise ConfigError(
                    f"{key} ({written[key].where}): is one for the whole curriculum; write it "
                    "beside `curriculum`, not in a stage"
                )

    def _fits(self, node: Located | None) -> tuple[str, str] | None:
        """The folders of both students of label_weight: {labels: STAGE, teacher: STAGE}."""
        if node is None:
            return None
        given = to_plain(node)
        if isinstance(given, dict) and given.keys() == {"labels", "teacher"}:
            names = str(given["labels"]), str(given["teacher"])
            if all(name in self._students for name in names):
                return self._students[names[0]].path, self._students[names[1]].path
        raise ConfigError(
            f"label_weight ({node.where}): expected {{labels: STAGE, teacher: STAGE}}, two earlier "
            f"stages of {', '.join(self._students) or 'which there are none'}: one fitted to "
            f"labels alone, one to its teacher alone; got {given}"
        )

    def _choose(self, role: str, written: dict[str, Located]) -> _Model | None:
        """The model of a role that earlier stages have left; None for one that is written out.

        A name of a stage is taken out of `written`.
        """
        node = written.get(role)
        if node is None or (
            isinstance(node.value, dict) and not node.value.keys() & {"path", "architecture"}
        ):
            return self._carried.get(role)
        if not isinstance(node.value, str):
            return None
        if node.value not in self._students:
            known = ", ".join(self._students) or "none, it is the first stage"
            raise ConfigError(
                f"{role} ({node.where}): expected a model, or the name of an earlier stage whose "
                f"student it is ({known}), got {node.value!r}"
            )
        del written[role]
        return self._students[node.value]

    def _start(self, name: str, chosen: Mapping[str, _Model | None]) -> Located:
        """What a stage's own keys are laid on."""
        number, where = len(self.stages), f"the stages before {name!r}"
        is_last = number + 1 == len(self._config.curriculum)

        def text(value: str | int | bool | None) -> Located:
            return Located(value, where)

        assert isinstance(self._base.value, dict)
        start = dict(self._base.value)
        start["name"], start["seed"] = text(self._name(name)), text(self._config.seed + number)
        start["runs_directory"], start["runs_mirror"] = text(str(self._folder)), text(None)
        for role, model in chosen.items():
            if model is not None:
                trusted = text(model.stand_in.trust_remote_code)
                parts = {"path": text(model.path), "trust_remote_code": trusted}
                start[role] = Located(dict(parts), where)
            elif self.stages:
                start.pop(role, None)  # it is written out whole
        if self.stages:
            first = self._folder / self.stages[0].config.name
            parts = {"type": text("pretrained"), "path": text(str(first / "tokenizer"))}
            start["tokenizer"] = Located(dict(parts), where)
        tree = Located(start, self._base.where)
        if is_last:
            return tree
        # The next stage goes on from the very weights: nothing is rounded on the way.
        exact = Located({"export": Located({"dtype": text("float32")}, where)}, where)
        unpushed = Located({"hub": text(None)}, where)
        root = root_slot(RunConfig)
        return merge(merge(tree, exact, root), unpushed, root)

    def _name(self, name: str) -> str:
        """Of the stage's folder: in order, and no file of a run's has such a name."""
        return f"{len(self.stages) + 1}_{name}"

    def _tokenizer(self) -> TokenizerConfig:
        """The run's, where it does not hang on who the teacher of a stage is."""
        given = self._config.tokenizer
        if isinstance(given, PretrainedTokenizer) and given.path is None:
            return PretrainedTokenizer(path=self._config.teacher.path)
        return given

    def _leave(self, name: str, config: RunConfig, stand_ins: Mapping[str, ModelConfig]) -> None:
        """What later stages may start from; the folders are those of observe.RunDirectory."""
        folder = self._folder / config.name
        tuned = {"teacher": str(folder / "teacher"), "student": str(folder / "student_sft")}
        began = {
            role: _Model(
                path=tuned[role] if getattr(config, role).sft else str(getattr(config, role).path),
                stand_in=stand_ins[role],
            )
            for role in ROLES
        }
        left = _Model(path=str(folder / "student"), stand_in=stand_ins["student"])
        if not self._students:
            self._students["initial"] = began["student"]
        self._students |= {name: left, "previous": left}
        self._carried = {"teacher": began["teacher"], "student": left}


def _require_interpolation(config: RunConfig) -> None:
    objective = config.distill.objective
    losses = [getattr(objective, stream, None) for stream in ("off_policy", "on_policy")]
    read = [each for each in losses if isinstance(each, InterpolatedCrossEntropyConfig)]
    if not read or any(loss.schedule != "constant" for loss in read):
        raise ConfigError(
            "label_weight is a constant weight of interpolated_cross_entropy: expected "
            "distill.objective={type: token_matching, off_policy: {type: "
            f"interpolated_cross_entropy, schedule: constant}}}}, got {objective.model_dump()}"
        )


def _standing(model: _Model, config: RunConfig, role: str) -> ModelConfig:
    """The stand-in, fine-tuned as the stage asks."""
    return model.stand_in.model_copy(update={"sft": getattr(config, role).sft})
