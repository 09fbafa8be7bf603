"""A `Network` as JSON, so that another process can train it: each value with the name of its type."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args

from hwnas.network import Network, Node, Operator, Tensor, Unit

_TYPES = {kind.__name__: kind for kind in (Network, Unit, Node, Tensor, *get_args(Operator))}


def to_json(value: Any) -> Any:
    """Dictionaries, lists, numbers and texts of a network or a part of it."""
    if is_dataclass(value):
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    return [to_json(part) for part in value] if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, dict):
        return _TYPES[value["type"]](**{name: from_json(part) for name, part in value.items() if name != "type"})
    return tuple(from_json(part) for part in value) if isinstance(value, list) else value
