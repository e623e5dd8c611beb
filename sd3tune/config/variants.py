"""Registration of section variants from outside the package, which the strict schema treats like its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Field

from sd3tune.config.schema import Config
from sd3tune.config.sections.data import DataConfig, Source
from sd3tune.config.sections.flow import FlowConfig, LossSection, TimestepsSection, WeightingSection
from sd3tune.config.sections.method_section import MethodSection
from sd3tune.config.sections.optimizer import OptimizerSection
from sd3tune.config.sections.schedule import ScheduleSection
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import item_of, kind_of, sections_of

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class VariantField:
    """A field of the schema whose section has several kinds."""

    owner: type[Section]
    name: str
    base: type[Section]
    """Base class of every kind."""

    @property
    def sections(self) -> list[type[Section]]:
        annotation = self.owner.model_fields[self.name].annotation
        item = item_of(annotation)
        return sections_of(annotation if item is None else item)

    def set_sections(self, sections: list[type[Section]]) -> None:
        """Replace the kinds that the schema accepts."""
        field = self.owner.model_fields[self.name]
        union: Any = Union[tuple(sections)]  # noqa: UP007  (built at run time)
        if item_of(field.annotation) is not None:
            union = list[Annotated[union, Field(discriminator="kind")]]
        field.annotation = union
        self.owner.model_rebuild(force=True)
        Config.model_rebuild(force=True)  # as it contains the owner


METHOD = VariantField(Config, "method", MethodSection)
OPTIMIZER = VariantField(Config, "optimizer", OptimizerSection)
SCHEDULE = VariantField(Config, "schedule", ScheduleSection)
TIMESTEPS = VariantField(FlowConfig, "timesteps", TimestepsSection)
WEIGHTING = VariantField(FlowConfig, "weighting", WeightingSection)
LOSS = VariantField(FlowConfig, "loss", LossSection)
SOURCE = VariantField(DataConfig, "sources", Source)


class Registry(dict[str, Entry]):
    """Map from `kind` to its implementation, for one field of the schema."""

    def __init__(self, field: VariantField, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.field = field

    def register(self, section: type[Section], entry: Entry) -> None:
        """Add a kind. Raises ValueError for an invalid section, and for a kind that is already registered."""
        kind, base = kind_of(section), self.field.base
        declared = section.model_fields.get("kind")
        if not issubclass(section, base):
            raise ValueError(
                f"{section.__name__}: must be a subclass of {base.__name__}, as a kind of `{self.field.name}`"
            )
        if kind is None or declared is None or get_origin(declared.annotation) is not Literal:
            raise ValueError(f'{section.__name__}: has no kind; give it one, such as `kind: Literal["new"] = "new"`')
        if get_args(declared.annotation) != (kind,):
            raise ValueError(f"{section.__name__}: the default of `kind` must be its only value")
        if kind in self:
            raise ValueError(f"{section.__name__}: `{self.field.name}` already has a kind {kind!r}; choose another")
        self.field.set_sections([*self.field.sections, section])
        self[kind] = entry

    def unregister(self, kind: str) -> None:
        """Remove a registered kind. Raises KeyError if there is none."""
        del self[kind]
        self.field.set_sections([section for section in self.field.sections if kind_of(section) != kind])
