"""Kinds of a section from outside the package: the strict schema takes them as it takes its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Field

from sd3tune.config.schema import Config
from sd3tune.config.sections.data import DataConfig, Source
from sd3tune.config.sections.flow import FlowConfig, TimestepsSection, WeightingSection
from sd3tune.config.sections.method import MethodSection
from sd3tune.config.sections.optimizer import OptimizerSection, ScheduleSection
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import item_of, kind_of, sections_of

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Place:
    """Where the schema has a section of several kinds."""

    owner: type[Section]
    field: str
    base: type[Section]
    """What each kind is a subclass of."""

    @property
    def sections(self) -> list[type[Section]]:
        annotation = self.owner.model_fields[self.field].annotation
        item = item_of(annotation)
        return sections_of(annotation if item is None else item)

    def take(self, sections: list[type[Section]]) -> None:
        """Make the schema take these kinds, whatever it took before."""
        field = self.owner.model_fields[self.field]
        union: Any = Union[tuple(sections)]  # noqa: UP007  (made while running)
        if item_of(field.annotation) is not None:
            union = list[Annotated[union, Field(discriminator="kind")]]
        field.annotation = union
        self.owner.model_rebuild(force=True)
        Config.model_rebuild(force=True)  # which holds the owner


METHOD = Place(Config, "method", MethodSection)
OPTIMIZER = Place(Config, "optimizer", OptimizerSection)
SCHEDULE = Place(Config, "schedule", ScheduleSection)
TIMESTEPS = Place(FlowConfig, "timesteps", TimestepsSection)
WEIGHTING = Place(FlowConfig, "weighting", WeightingSection)
SOURCE = Place(DataConfig, "sources", Source)


class Registry(dict[str, Entry]):
    """`kind` -> what makes it work, for the kinds of one place of the schema."""

    def __init__(self, place: Place, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.place = place

    def register(self, section: type[Section], entry: Entry) -> None:
        """Add a kind. Raises ValueError for a section that cannot be one, and for a kind that is there already."""
        kind, base = kind_of(section), self.place.base
        field = section.model_fields.get("kind")
        if not issubclass(section, base):
            raise ValueError(f"{section.__name__}: not a {base.__name__}, which every kind of `{self.place.field}` is")
        if kind is None or field is None or get_origin(field.annotation) is not Literal:
            raise ValueError(f'{section.__name__}: has no kind; give it one, such as `kind: Literal["new"] = "new"`')
        if get_args(field.annotation) != (kind,):
            raise ValueError(f"{section.__name__}: the default of its kind is not the one value that it takes")
        if kind in self:
            raise ValueError(f"{section.__name__}: `{self.place.field}` has a kind {kind!r} already; choose another")
        self.place.take([*self.place.sections, section])
        self[kind] = entry

    def unregister(self, kind: str) -> None:
        """Take away a kind that was registered. Raises KeyError where there is none."""
        del self[kind]
        self.place.take([section for section in self.place.sections if kind_of(section) != kind])
