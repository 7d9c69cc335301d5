"""What every loss shares. A loss is declared once, as a class whose fields are its options.

The class is a module; ``voxfuse.losses.functional`` makes the function of the same options.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from torch import Tensor

from voxfuse.losses.declared import Declared
from voxfuse.losses.engine import evaluate
from voxfuse.losses.options import (
    WEIGHT_NAMES,
    ClassWeights,
    OverlapOptions,
    check_flag,
    held,
    monai_hint,
    refuse_arguments,
    weights_of,
)
from voxfuse.losses.plan import Recipe
from voxfuse.losses.sums import Sums


@dataclass(kw_only=True, eq=False, repr=False)
class Loss(Declared):
    """A loss whose options are attributes; changing one takes effect at the next call."""

    process_group: Any = None
    ddp_average: bool = False
    backend: str = "auto"
    class_weight: ClassWeights = None

    #: Options always shown by repr; others are shown where they differ from the default.
    shown: ClassVar[tuple[str, ...]] = ()
    takes_tensors = False

    @classmethod
    def hint(cls, option: str) -> str | None:
        return monai_hint(option, cls.defaults)

    def set_up(self, *args: Any, **options: Any) -> None:
        for name in WEIGHT_NAMES:
            self.register_buffer(name, weights_of(name, options.pop(name, None)))
        super().set_up(**options)
        self.validate()

    def validate(self) -> None:
        """Raise for options that do not fit."""
        raise NotImplementedError

    @classmethod
    def of(
        cls,
        options: Any,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None,
        return_sums: bool = False,
        annotated: Tensor | None = None,
    ) -> Any:
        """The loss with ``options``, which has the attributes of a module, or a pair with sums."""
        raise NotImplementedError

    if TYPE_CHECKING:  # of a module's call type checkers know nothing

        @overload
        def __call__(
            self,
            input: Tensor,
            target: Tensor,
            mask: Tensor | None = None,
            *,
            annotated: Tensor | None = None,
            return_sums: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            input: Tensor,
            target: Tensor,
            mask: Tensor | None = None,
            *,
            annotated: Tensor | None = None,
            return_sums: Literal[True],
        ) -> tuple[Tensor, Sums]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        return_sums: bool = False,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Sums]:
        r"""Return the loss, or with ``return_sums`` the pair of the loss and its :class:`Sums`.

        Args:
            input: logits (or probabilities with ``activation="none"``) (B, C, \*spatial).
            target: labels (B, [1,] \*spatial) or dense (B, C, \*spatial); with C = 1 the
                foreground indicator.
            mask: mask or voxel weights (B, [1,] \*spatial); weight 0 leaves a voxel out.
            annotated: which classes are annotated in which sample, bool (B, C); the option
                ``unlabelled`` says what becomes of the others.
            return_sums: also return what the loss was computed from, without a second pass:
                detached soft counts (of all ranks, and pooled, where ``process_group`` does so),
                with ``dice()`` and other scores. TypeError where the loss is not made of sums.
        """
        refuse_arguments(self, others)
        result: Tensor | tuple[Tensor, Sums] = self.of(
            self, input, target, mask, return_sums, annotated
        )
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WEIGHT_NAMES:
            value = weights_of(name, value)
        elif name in self.defaults:
            value = held(name, value, self.defaults[name])
            check_flag(name, value, self.defaults[name])
        super().__setattr__(name, value)
        if name in self.defaults:
            self.__dict__["_recipe"] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        """A copy in this process shares the ``process_group``."""
        twin: Any = self.__new__(type(self))
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        result: Loss = twin
        return result

    def extra_repr(self) -> str:
        parts = []
        for name, default in self.defaults.items():
            value = getattr(self, name)
            if name in WEIGHT_NAMES:
                if value is not None:
                    shown = value if value.ndim > 1 else value.flatten()
                    parts.append(f"{name}={shown.double().round(decimals=6).tolist()}")
            elif name in self.shown or value != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


@dataclass(kw_only=True, eq=False, repr=False)
class LossModule(Loss):
    """A loss that is made of sums over the voxels."""

    def make_recipe(self) -> Recipe:
        """Validate the options; a function calls it with options that are no module."""
        raise NotImplementedError

    @property
    def recipe(self) -> Recipe:
        """What the options say now."""
        recipe: Recipe | None = self.__dict__["_recipe"]
        if recipe is None:
            recipe = self.__dict__["_recipe"] = self.make_recipe()
        return recipe

    def validate(self) -> None:
        self.recipe  # noqa: B018

    @classmethod
    def of(
        cls,
        options: Any,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None,
        return_sums: bool = False,
        annotated: Tensor | None = None,
    ) -> Any:
        recipe = options.recipe if isinstance(options, LossModule) else cls.make_recipe(options)
        return evaluate(recipe, input, target, mask, options, return_sums, annotated)


@dataclass(kw_only=True, eq=False, repr=False)
class OverlapLoss(LossModule, OverlapOptions):
    """A loss with a ratio of sums."""
