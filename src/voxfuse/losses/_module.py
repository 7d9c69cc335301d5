"""What every loss module shares: options as attributes, a recipe made from them, a good repr."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from voxfuse.losses._engine import ClassWeights, evaluate
from voxfuse.losses._options import CALL_DEFAULTS, OVERLAP_DEFAULTS, WEIGHT_NAMES
from voxfuse.losses._ranks import ranks_of
from voxfuse.losses._recipe import Recipe


def option_defaults(recipe_from: Callable[..., Recipe]) -> dict[str, Any]:
    """Every option of the recipes of ``recipe_from`` with its default."""
    defaults: dict[str, Any] = {}
    for parameter in inspect.signature(recipe_from).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            defaults.update(OVERLAP_DEFAULTS)
        else:
            defaults[parameter.name] = parameter.default
    return defaults


class HoldsGroup(nn.Module):
    """A module with a ``process_group``, which a copy in this process shares."""

    process_group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsGroup:
        twin: Any = self.__new__(type(self))
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        result: HoldsGroup = twin
        return result


def with_keywords(signature: inspect.Signature, options: Mapping[str, Any]) -> inspect.Signature:
    """``signature`` with every option in the place of ``**options``, for help() and editors."""
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in options.items()
        if name not in signature.parameters
    ]
    return signature.replace(parameters=[*own, *rest])


class LossModule(HoldsGroup):
    """A loss whose options are attributes; changing one takes effect at the next call."""

    #: Builds the recipe from the options.
    recipe_from: Callable[..., Recipe]
    #: Options always shown by repr; others are shown where they differ from the default.
    shown: tuple[str, ...] = ()
    #: Which weights of the classes the loss takes.
    weight_names: tuple[str, ...] = ("class_weight",)
    _defaults: dict[str, Any]

    class_weight: Tensor | None
    likelihood_weight: Tensor | None
    pos_weight: Tensor | None
    ddp_average: bool
    backend: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "recipe_from" not in vars(cls):
            return
        cls._defaults = {**option_defaults(cls.recipe_from), **CALL_DEFAULTS}
        bound = inspect.signature(cls.__init__.__get__(cls))
        options = {**cls._defaults, **dict.fromkeys(cls.weight_names)}
        cls.__signature__ = with_keywords(  # type: ignore[attr-defined]
            bound.replace(return_annotation=inspect.Signature.empty), options
        )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = type(self).__signature__.parameters  # type: ignore[attr-defined]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{name}: not an option of {type(self).__name__}, which has " + ", ".join(known)
                )
        for name in WEIGHT_NAMES:
            value = options.pop(name, None)
            if value is not None and not isinstance(value, Tensor):
                value = torch.as_tensor(value, dtype=torch.float64)
            self.register_buffer(name, value)
        for name, default in self._defaults.items():
            setattr(self, name, options.get(name, default))
        self._recipe: Recipe | None = self._make_recipe()

    def _make_recipe(self) -> Recipe:
        names = (name for name in self._defaults if name not in CALL_DEFAULTS)
        return type(self).recipe_from(**{name: getattr(self, name) for name in names})

    @property
    def recipe(self) -> Recipe:
        """What the options say now."""
        if self._recipe is None:
            self._recipe = self._make_recipe()
        return self._recipe

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._defaults:
            self.__dict__["_recipe"] = None

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        r"""Return the loss.

        Args:
            input: logits (or probabilities with ``activation="none"``) (B, C, \*spatial).
            target: labels (B, [1,] \*spatial) or dense (B, C, \*spatial); with C = 1 the
                foreground indicator.
            weight: voxel weights or mask (B, [1,] \*spatial); weight 0 leaves a voxel out.
        """
        group = self.process_group
        return evaluate(
            self._recipe or self.recipe,
            input,
            target,
            weight,
            self.class_weight,
            self.likelihood_weight,
            self.pos_weight,
            None if group is None else ranks_of(group, self.ddp_average),
            self.backend,
        )

    @classmethod
    def of(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *,
        class_weight: ClassWeights = None,
        likelihood_weight: ClassWeights = None,
        pos_weight: ClassWeights = None,
        process_group: Any = None,
        ddp_average: bool = False,
        backend: str = "auto",
        **options: Any,
    ) -> Tensor:
        """The loss with these options, without a module."""
        return evaluate(
            cls.recipe_from(**options),
            input,
            target,
            weight,
            class_weight,
            likelihood_weight,
            pos_weight,
            ranks_of(process_group, ddp_average),
            backend,
        )

    def extra_repr(self) -> str:
        parts = []
        for name, default in self._defaults.items():
            value = getattr(self, name)
            if name in self.shown or value != default:
                parts.append(f"{name}={value!r}")
        for name in WEIGHT_NAMES:
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={[round(x, 6) for x in value.flatten().tolist()]}")
        return ", ".join(parts)
