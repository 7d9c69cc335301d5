"""Modules that are declared once, as a class whose fields are the arguments of its constructor."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from typing_extensions import dataclass_transform

Kind = TypeVar("Kind", bound="type[Declared]")


def did_you_mean(option: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown option: the known one that is spelt most like it."""
    close = difflib.get_close_matches(option, list(options), 1, 0.75)
    return f"; did you mean {close[0]}?" if close else ""


class Declared(nn.Module):
    """A module made by :func:`declared`."""

    #: Every option with its default, in the constructor's order.
    defaults: ClassVar[dict[str, Any]] = {}

    #: Whether an argument by position may be a tensor with several axes.
    takes_tensors: ClassVar[bool] = True

    @classmethod
    def hint(cls, option: str) -> str | None:
        """What to say of an ``option`` that is not one of this class."""
        return None

    def set_up(self, *args: Any, **options: Any) -> None:
        """Take the options, every one of them by name."""
        for name, value in options.items():
            setattr(self, name, value)


@dataclass_transform(eq_default=False)
def declared(kind: Kind) -> Kind:
    """Give ``kind`` a constructor with its fields as arguments, which ``set_up`` gets by name."""
    made: Any = dataclass(eq=False, repr=False)(kind)
    signature = inspect.signature(made.__init__)
    self, *options = signature.parameters.values()
    # A dataclass puts what its base has first; a class that states every field says their order.
    stated = list(inspect.get_annotations(kind))
    if all(option.name in stated for option in options):
        options.sort(key=lambda option: stated.index(option.name))
        signature = signature.replace(parameters=[self, *options])
    made.defaults = {option.name: option.default for option in options}
    positional = [x.name for x in options if x.kind is x.POSITIONAL_OR_KEYWORD]
    required = [x.name for x in options if x.default is x.empty]

    # By hand and not by ``signature.bind``, into which torch.compile does not look.
    def __init__(self: Any, *args: Any, **named: Any) -> None:
        name = type(self).__name__
        others = [value for option, value in named.items() if option not in made.defaults]
        for value in () if made.takes_tensors else (*args, *others):
            if isinstance(value, Tensor) and value.ndim > 1:
                raise TypeError(
                    f"{name}: got a tensor of shape {tuple(value.shape)} in place of an option; "
                    f"construct the loss first: {name}()(logits, labels)"
                )
        for option in named:
            if option not in made.defaults:
                hint = made.hint(option)
                more = f", which has {', '.join(made.defaults)}"
                more = f"; {hint}" if hint else more + did_you_mean(option, made.defaults)
                raise TypeError(f"{option}: not an option of {name}{more}")
        if len(args) > len(positional):
            raise TypeError(
                f"{name}: too many positional arguments, got {len(args)}, expected at most "
                f"{len(positional)}"
            )
        placed = dict(zip(positional, args, strict=False))
        for option in placed:
            if option in named:
                raise TypeError(f"{option}: given to {name} by position and by name")
        given = {**made.defaults, **placed, **named}
        for option in required:
            if option not in placed and option not in named:
                raise TypeError(f"{option}: {name} needs it")
        super(Declared, self).__init__()
        self.set_up(**given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    made.__init__ = __init__
    for base in made.__mro__:
        for name in made.defaults:
            if name in vars(base) and "__dataclass_fields__" in vars(base):
                # The default that a dataclass leaves in its class would hide a buffer.
                delattr(base, name)
    return made  # type: ignore[no-any-return]
