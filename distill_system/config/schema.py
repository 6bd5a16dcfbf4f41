"""What the configuration models expect at each dotted path.

Loading merges layers and writes error messages with it; the reference page is made from it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from distill_system.config.base import ConfigModel

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place in the configuration that holds a value.

    annotation: the declared type, without Annotated and without `| None`.
    bounds: limits of a number, as (sign, limit).  nullable: whether null may stand here.
    required: whether a value must be given.  default: the value where none is given.
    description: the field's docstring, "" if it has none.
    """

    annotation: Any
    bounds: tuple[tuple[str, float], ...] = ()
    nullable: bool = False
    required: bool = True
    default: Any = None
    description: str = ""

    @property
    def models(self) -> tuple[type[ConfigModel], ...]:
        """The models for a mapping here: none, one, or the alternatives of a union."""
        members = get_args(self.annotation) if _is_union(self.annotation) else (self.annotation,)
        unwrapped = [_unwrap(member)[0] for member in members]
        return tuple(m for m in unwrapped if isinstance(m, type) and issubclass(m, ConfigModel))

    @property
    def is_plain_union(self) -> bool:
        """Whether values of several types may stand here, none of them a model."""
        return _is_union(self.annotation) and not self.models

    @property
    def discriminator(self) -> str | None:
        """The key that chooses between a union's alternatives; None if there is no union."""
        return _discriminator(self.models) if len(self.models) > 1 else None

    @property
    def alternatives(self) -> dict[str, type[ConfigModel]]:
        """Each value of the discriminator with its model; empty if there is no union."""
        key = self.discriminator
        return {_literals(model, key)[0]: model for model in self.models} if key else {}

    @property
    def default_tag(self) -> str | None:
        """The discriminator's value where a mapping gives none; None if it must.

        That of the default, or, where the default is null, that of the first alternative whose own
        default it is.
        """
        if not self.discriminator:
            return None
        if self.default is not None:
            return getattr(self.default, self.discriminator, None)
        has_default = (m for m in self.models if not fields_of(m)[self.discriminator].required)
        first = next(has_default, None)
        return None if first is None else _literals(first, self.discriminator)[0]

    def model_for(self, tag: object) -> type[ConfigModel] | None:
        """The model for a mapping with this value of the discriminator."""
        if self.discriminator:
            return self.alternatives.get(tag) if isinstance(tag, str) else None
        return self.models[0] if self.models else None

    def child(self, key: str | int, tag: object = None) -> Slot:
        """The slot of one key of a mapping, or of one item of a list; ANYTHING if unknown."""
        model = self.model_for(tag)
        if model is not None:
            return fields_of(model).get(str(key), ANYTHING)
        arguments = get_args(self.annotation)
        if get_origin(self.annotation) is dict:
            return _slot_of(arguments[1])
        if get_origin(self.annotation) is tuple and isinstance(key, int):
            items = arguments[:1] * (key + 1) if arguments[1:] == (Ellipsis,) else arguments
            return _slot_of(items[key]) if key < len(items) else ANYTHING
        return ANYTHING


ANYTHING = Slot(annotation=object)
"""The slot of a key that no model knows."""


def root_slot(model: type[ConfigModel]) -> Slot:
    """The slot of a whole configuration of this model."""
    return Slot(annotation=model)


def fields_of(model: type[ConfigModel]) -> Mapping[str, Slot]:
    """The slots of a model, in the order its fields are declared."""
    return {name: _slot_of_field(field) for name, field in model.model_fields.items()}


def describe(slot: Slot) -> str:
    """What a slot expects, in words, such as "a whole number > 0 or null"."""
    return _describe_value(slot) + (" or null" if slot.nullable else "")


def quoted_list(names: tuple[str, ...] | list[str]) -> str:
    """Names in quotes, the last two joined by "or"."""
    quoted = [f"'{name}'" for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _describe_value(slot: Slot) -> str:
    arguments = get_args(slot.annotation)
    if slot.discriminator:
        return f"a mapping with {slot.discriminator} {quoted_list(list(slot.alternatives))}"
    if slot.models:
        return f"a mapping with the keys {', '.join(slot.models[0].model_fields)}"
    if _is_union(slot.annotation):
        return ", or ".join(describe(_slot_of(member)) for member in arguments)
    if get_origin(slot.annotation) is Literal:
        return quoted_list([str(argument) for argument in arguments])
    if get_origin(slot.annotation) is dict:
        return f"a mapping of names, each to {describe(_slot_of(arguments[1]))}"
    if get_origin(slot.annotation) is tuple:
        item = describe(_slot_of(arguments[0]))
        many = arguments[1:] == (Ellipsis,)
        return f"a list, each item {item}" if many else f"a list of {len(arguments)}, each {item}"
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    limits = " and ".join(f"{sign} {limit:g}" for sign, limit in slot.bounds)
    return f"{nouns.get(slot.annotation, 'a value')} {limits}".rstrip()


def _slot_of_field(field: FieldInfo) -> Slot:
    annotation, metadata, nullable = _unwrap(field.annotation)
    return Slot(
        annotation=annotation,
        bounds=_bounds([*field.metadata, *metadata]),
        nullable=nullable,
        required=field.is_required(),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        description=" ".join((field.description or "").split()),
    )


def _slot_of(annotation: Any) -> Slot:
    inner, metadata, nullable = _unwrap(annotation)
    return Slot(annotation=inner, bounds=_bounds(metadata), nullable=nullable)


def _unwrap(annotation: Any) -> tuple[Any, list[Any], bool]:
    """Strip Annotated and `| None` off a type: inner type, metadata, whether null is allowed."""
    metadata: list[Any] = []
    nullable = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *annotated = get_args(annotation)
            metadata += annotated
        elif _is_union(annotation) and types.NoneType in get_args(annotation):
            nullable = True
            rest = tuple(a for a in get_args(annotation) if a is not types.NoneType)
            annotation = Union[rest]  # noqa: UP007 - the members are known at run time alone
        else:
            return annotation, metadata, nullable


def _bounds(metadata: list[Any]) -> tuple[tuple[str, float], ...]:
    # PositiveInt is Annotated[int, Gt(0)], but Field(gt=0) wraps its Gt in a FieldInfo.
    constraints: list[Any] = []
    for item in metadata:
        constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    return tuple(
        (sign, getattr(item, name))
        for item in constraints
        for name, sign in _SIGNS.items()
        if getattr(item, name, None) is not None
    )


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _discriminator(models: tuple[type[ConfigModel], ...]) -> str:
    """The field that has a single literal value in each model, and a different one in each."""
    for name in models[0].model_fields:
        values = [_literals(model, name) for model in models]
        if all(len(v) == 1 for v in values) and len(set(values)) == len(models):
            return name
    raise AssertionError(f"no field tells {[model.__name__ for model in models]} apart")


def _literals(model: type[ConfigModel], name: str) -> tuple[str, ...]:
    field = model.model_fields.get(name)
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return get_args(field.annotation)
