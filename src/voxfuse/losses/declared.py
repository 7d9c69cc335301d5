"""Modules that are declared once, as a class whose fields are the arguments of its constructor."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn
from typing_extensions import dataclass_transform

Kind = TypeVar("Kind", bound="type[Declared]")


class Declared(nn.Module):
    """A module made by :func:`declared`."""

    #: Every option with its default, in the constructor's order.
    defaults: ClassVar[dict[str, Any]] = {}

    def set_up(self, *args: Any, **options: Any) -> None:
        """Take the options, every one of them by name."""
        for name, value in options.items():
            setattr(self, name, value)


@dataclass_transform(eq_default=False)
def declared(kind: Kind) -> Kind:
    """Give ``kind`` a constructor with its fields as arguments, which ``set_up`` gets by name."""
    made: Any = dataclass(eq=False, repr=False)(kind)
    signature = inspect.signature(made.__init__)
    _, *options = signature.parameters.values()
    made.defaults = {option.name: option.default for option in options}

    def __init__(self: Any, *args: Any, **named: Any) -> None:
        for name in named:
            if name not in made.defaults:
                raise TypeError(
                    f"{name}: not an option of {type(self).__name__}, which has "
                    + ", ".join(made.defaults)
                )
        bound = signature.bind(self, *args, **named)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        nn.Module.__init__(self)
        self.set_up(**dict(given))

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    made.__init__ = __init__
    for base in made.__mro__:
        for name in made.defaults:
            if name in vars(base) and "__dataclass_fields__" in vars(base):
                # The default that a dataclass leaves in its class would hide a buffer.
                delattr(base, name)
    return made  # type: ignore[no-any-return]
