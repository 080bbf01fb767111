"""Walk over the fields of the settings, and check the ranges in their metadata."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pipeline.common.errors import UserError
from pipeline.config.settings import Config

ON_RESUME = {None: "must not change", "may change": "may change", "same content": "must name the same content"}


@dataclass(frozen=True)
class Interval:
    """Interval of real numbers. An infinite bound is never included.

    Attributes:
        low, high: the bounds.
        includes_low, includes_high: whether the bounds belong to the interval.
    """

    low: float
    high: float
    includes_low: bool
    includes_high: bool

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Parse interval notation such as "[0, 1)"."""
        match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text)
        assert match, text
        return cls(float(match[2]), float(match[3]), match[1] == "[", match[4] == "]")

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        """Describe the interval in words, to follow "must be"."""
        if self.includes_low and self.includes_high:
            return f"between {self.low:.0f} and {self.high:.0f}"
        low = f"{'at least' if self.includes_low else 'greater than'} {self.low:.0f}"
        if self.high == float("inf"):
            return f"{low} and finite"
        return f"{low} and {'at most' if self.includes_high else 'less than'} {self.high:.0f}"


def leaf_fields(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield the dotted key and the field of every setting, without the sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaf_fields(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, field


def value_of(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_ranges(config: Config, source: object) -> None:
    """Check that every number is in the range of its field's metadata. For a mapping or list, its values are checked.

    Args:
        config: the settings.
        source: the recipe, for the error message.

    Raises:
        UserError: a number is out of range, NaN or infinite, or a setting that must not be null is null.
    """
    for key, field in leaf_fields():
        if value_of(config, key) is None and type(None) not in get_args(field.type):
            raise UserError(f"{source}: {key} is null; give it a value, or remove it for the default {field.default!r}")
        if "range" not in field.metadata:
            continue
        interval, value = Interval.parse(field.metadata["range"]), value_of(config, key)
        values = {key: value}
        if isinstance(value, dict):
            values = {f"{key}.{name}": v for name, v in value.items()}
        elif isinstance(value, list):
            values = {f"{key}[{i}]": v for i, v in enumerate(value)}
        for name, number in values.items():
            if number is not None and number not in interval:
                raise UserError(f"{source}: {name} is {number}; it must be {interval}")


def constraints(field: dataclasses.Field) -> str:
    """Describe the range of a setting and what resuming requires of it, for --help."""
    parts = [str(Interval.parse(field.metadata["range"]))] if "range" in field.metadata else []
    return ", ".join([*parts, f"on resume: {ON_RESUME[field.metadata.get('on_resume')]}"])
