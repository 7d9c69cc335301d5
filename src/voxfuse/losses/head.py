"""Losses from the features before the last layer: the logits of many classes never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from voxfuse._ranks import ranks_of
from voxfuse.losses.compound import DiceCELoss
from voxfuse.losses.declared import declared
from voxfuse.losses.deep_supervision import DeepSupervisionLoss
from voxfuse.losses.engine import call_of, loss_of_call, partial_call, reraise, with_voxels
from voxfuse.losses.module import LossModule
from voxfuse.losses.of_sums import SumsLoss
from voxfuse.losses.options import refuse_arguments
from voxfuse.losses.overlap import TverskyLoss
from voxfuse.losses.sums import Sums, sums_of
from voxfuse.ops import _checks, _registry
from voxfuse.ops.head_confusion import CHUNK_BYTES, check_head
from voxfuse.ops.soft_confusion import is_dense, validate_range


def head_loss(
    loss: nn.Module,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    annotated: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    return_sums: bool = False,
) -> Any:
    r"""``loss`` of the logits ``weight @ features + bias``, without the logits.

    They are computed chunk by chunk, reduced to the loss's sums and thrown away, in the backward
    pass once more. Memory grows with the K features, not with the C classes; with C above K it is
    also faster. The value and the gradients of features, weight and bias are those of the separate
    convolution and loss, within rounding.

    Args:
        loss: a loss of this package that is made of sums: every one but those by voxel
            (``reduction="none"`` of a cross-entropy, top-k) and the Lovász loss.
        features: input of the last layer (B, K, \*spatial), float32, float16, bfloat16 or float64.
        weight: (C, K), or as a 1x1x1 convolution keeps it (C, K, 1, 1, 1).
        bias: (C,) or None.
        target: labels (B, [1,] \*spatial) or dense (B, C, \*spatial).
        mask: mask or voxel weights (B, [1,] \*spatial).
        annotated: which classes are annotated in which sample, bool (B, C).
        chunk_bytes: most bytes of logits that exist at one time.
        return_sums: also return what the loss was computed from, :class:`voxfuse.Sums`.

    Returns:
        the loss, as ``loss(logits, target, mask)`` returns it, or a pair with the sums.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``loss`` is not made of sums.

    Example:
        >>> import torch, voxfuse
        >>> head = torch.nn.Conv3d(16, 100, 1)
        >>> features, labels = torch.randn(1, 16, 8, 8, 8), torch.randint(0, 100, (1, 8, 8, 8))
        >>> loss = voxfuse.DiceCELoss(include_background=False)
        >>> fused = voxfuse.head_loss(loss, features, head.weight, head.bias, labels)
        >>> torch.allclose(fused, loss(head(features), labels), rtol=1e-4)
        True
    """
    loss = _of_sums(loss)
    recipe = loss.recipe
    features = _checks.require_tensor("features", features)
    weight = _checks.require_tensor("weight", weight)
    target = _checks.require_tensor("target", target)
    if bias is not None:
        bias = _checks.require_tensor("bias", bias)
    if mask is not None:
        mask = _checks.require_tensor("mask", mask)
    weight = check_head(features, weight, bias, target, mask, recipe.ignore_index, chunk_bytes)
    classes = weight.shape[0]
    dense = is_dense(features, target, classes)
    group = loss.process_group
    ranks = None if group is None else ranks_of(group, loss.ddp_average)
    call = call_of(recipe, features, classes, dense, loss, ranks)
    if annotated is not None:
        call = partial_call(recipe, call, features, classes, annotated)
    unread = (call.annotated, recipe.unlabelled)
    validate_range(features, target, mask, recipe.ignore_index, *unread, classes)
    confusion = _registry.namespace_of(loss.backend, features.device).head_confusion
    try:
        sums = confusion(
            features,
            weight,
            bias,
            target,
            mask,
            **call.plan.confusion._asdict(),
            full=call.plan.full,
            chunk_bytes=chunk_bytes,
            annotated=call.annotated,
        )
        sums = with_voxels(sums, call)
        value, sums = loss_of_call(call, sums, features.dtype == torch.float64)
    except RuntimeError as error:
        reraise(error, target, recipe.ignore_index)
    return (value, sums_of(sums)) if return_sums else value


def _of_sums(loss: object) -> LossModule:
    """Return ``loss``, or the one inside a HeadLoss, if it is made of sums over the voxels."""
    if isinstance(loss, HeadLoss):
        loss = loss.loss
    if not isinstance(loss, LossModule) or loss.recipe.by_voxel:
        kind = type(loss)
        adapter = kind.__module__.startswith("voxfuse.integrations.")
        given = f"{kind.__module__.split('._')[0]}.{kind.__name__}" if adapter else repr(loss)
        raise TypeError(
            f"loss: got {given}, expected a loss of voxfuse itself (no adapter of "
            "voxfuse.integrations) that is made of sums over the voxels, such as "
            "voxfuse.TverskyLoss, voxfuse.DiceCELoss or voxfuse.FocalLoss with a mean or sum"
        )
    return loss


class _OfFeatures(nn.Module):
    """A loss whose input is the features before the last layer."""

    chunk_bytes: int

    if TYPE_CHECKING:  # for HeadTverskyLoss: not that of a loss of logits
        __call__: Callable[..., Any]

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        return_sums: bool = False,
        **others: Any,
    ) -> Any:
        """Return the loss; the arguments are those of :func:`head_loss`."""
        refuse_arguments(self, others)
        return head_loss(
            self,
            features,
            weight,
            bias,
            target,
            mask,
            annotated=annotated,
            chunk_bytes=self.chunk_bytes,
            return_sums=return_sums,
        )


class HeadLoss(_OfFeatures):
    """A loss whose input is the features before the last layer, see :func:`head_loss`.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.HeadLoss(voxfuse.FocalTverskyLoss())
        >>> head = torch.nn.Conv3d(16, 50, 1)
        >>> features, labels = torch.randn(1, 16, 4, 4, 4), torch.randint(0, 50, (1, 4, 4, 4))
        >>> loss(features, head.weight, head.bias, labels).backward()
    """

    def __init__(self, loss: LossModule, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__()
        self.loss = _of_sums(loss)
        self.chunk_bytes = chunk_bytes


@declared
class HeadTverskyLoss(_OfFeatures, TverskyLoss):  # type: ignore[misc]  # other arguments of a call
    """:class:`TverskyLoss` of a linear head, from its features; see :func:`head_loss`.

    Args:
        alpha, beta, gamma, options: of :class:`TverskyLoss`.
        chunk_bytes: most bytes of logits that exist at one time.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.HeadTverskyLoss(alpha=0.3, beta=0.7)
        >>> head = torch.nn.Conv3d(8, 117, 1)
        >>> features, labels = torch.randn(1, 8, 4, 4, 4), torch.randint(0, 117, (1, 4, 4, 4))
        >>> loss(features, head.weight, head.bias, labels).shape
        torch.Size([])
    """

    chunk_bytes: int = field(default=CHUNK_BYTES, kw_only=True)


@declared
class HeadDiceCELoss(_OfFeatures, DiceCELoss):  # type: ignore[misc]  # other arguments of a call
    """:class:`DiceCELoss` of a linear head, from its features; see :func:`head_loss`.

    Args:
        lambda_dice, lambda_ce, options: of :class:`DiceCELoss`.
        chunk_bytes: most bytes of logits that exist at one time.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.HeadDiceCELoss(include_background=False)
        >>> head = torch.nn.Conv3d(8, 117, 1)
        >>> features, labels = torch.randn(1, 8, 4, 4, 4), torch.randint(0, 117, (1, 4, 4, 4))
        >>> loss(features, head.weight, head.bias, labels).shape
        torch.Size([])
    """

    chunk_bytes: int = field(default=CHUNK_BYTES, kw_only=True)


# --- A network whose last layer and loss are one --------------------------------------------------


class _Fusible:
    """A convolution that answers with the loss while a :class:`FusedHead` computes one.

    Copied or saved, it is the convolution that it was made of.
    """

    #: (head, features) -> loss. Not annotated: TorchScript would read that.
    loss_of = cast("Any", None)

    def forward(self, input: Tensor) -> Any:
        if self.loss_of is None:
            return super().forward(input)  # type: ignore[misc]
        return self.loss_of(self, input)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Not copyreg.__newobj__, for which the class has to be this one.
        return object.__new__, (_plain_class(type(self)),), self.__getstate__()


class _FusibleConv(_Fusible):
    """One that TorchScript understands, which knows no ``super()``."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.loss_of is not None:  # type: ignore[attr-defined]
            loss: Tensor = self.loss_of(self, input)
            return loss
        logits: Tensor = self._conv_forward(input, self.weight, self.bias)
        return logits


class FusibleConv1d(_FusibleConv, nn.Conv1d):
    """The head of a fused one-dimensional network."""


class FusibleConv2d(_FusibleConv, nn.Conv2d):
    """The head of a fused two-dimensional network."""


class FusibleConv3d(_FusibleConv, nn.Conv3d):
    """The head of a fused three-dimensional network."""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUSIBLE: dict[type, type] = {
    nn.Conv1d: FusibleConv1d,
    nn.Conv2d: FusibleConv2d,
    nn.Conv3d: FusibleConv3d,
}


@functools.cache
def _fusible_class(kind: type) -> type:
    """The fusible twin of a convolution class (a parametrised one makes its class at run time)."""
    if issubclass(kind, _Fusible):
        return kind
    return _FUSIBLE.get(kind) or type(f"Fusible{kind.__name__}", (_Fusible, kind), {})


def _plain_class(kind: type) -> type:
    """The class that ``_fusible_class`` made ``kind`` of."""
    return kind.__bases__[1] if issubclass(kind.__bases__[0], _Fusible) else kind


def _why_not_a_head(module: nn.Module) -> str | None:
    if not isinstance(module, _CONVOLUTIONS):
        return f"is a {type(module).__name__}, not a convolution"
    if any(extent != 1 for extent in module.kernel_size):
        return f"has a kernel of {tuple(module.kernel_size)}, not of 1"
    if any(step != 1 for step in module.stride) or module.groups != 1:
        return "has a stride or groups"
    if isinstance(module.padding, str):
        return None
    return "has padding" if any(module.padding) else None


def find_heads(model: nn.Module) -> list[str]:
    """Names of the heads of ``model``: its last convolution, and the list it is part of.

    Raises:
        ValueError: the last convolution is not a 1x1x1 one.
    """
    found = [name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no convolution; name its head=")
    last = found[-1]
    reason = _why_not_a_head(model.get_submodule(last))
    if reason is not None:
        raise ValueError(
            f"model: the last convolution of {type(model).__name__}, {last!r}, {reason}. Only a "
            "last layer that is linear in every voxel can be fused; if it is another module, "
            "name it as head="
        )
    parent, _, _ = last.rpartition(".")
    siblings = model.get_submodule(parent)
    # A list of heads, one a resolution, as nnU-Net's decoder keeps them.
    if isinstance(siblings, nn.ModuleList) and all(_why_not_a_head(m) is None for m in siblings):
        return [f"{parent}.{index}" for index in range(len(siblings))]
    return [last]


class _UsedError(Exception):
    """A network computes with what stands for its logits."""


#: What a network, and the hooks around its layers, may ask of a stand-in: nothing of its values or
#: axes.
_ASKED = {"device", "dtype", "get_device", "grad_fn", "is_cuda", "is_floating_point", "is_leaf"}
_ASKED |= {"layout", "register_hook", "requires_grad"}


class _StandIn(Tensor):
    """A head's loss in the hands of the network, which takes it for logits.

    A loss fits every axis: multiplied with features it would be a wrong number without a word. So
    the network may only hand it on, and do to it what changes nothing.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [_version(x) for x in given]
            result = func(*args, **kwargs)
            changed = before != [_version(x) for x in given]
        of_attribute = func.__name__ == "__get__"
        name = func.__self__.__name__ if of_attribute else func.__name__
        if name == "_base":  # sharded layers warn of writing into a view, which is refused anyway
            return None
        if name in _ASKED or (not changed and any(result is x for x in given)):
            return result
        raise _UsedError(f"{'reads its ' if of_attribute else 'calls '}{name}")


def _version(tensor: Tensor) -> int:
    """How often a tensor was overwritten, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version


class _Answer(NamedTuple):
    """What a head computed, and what it gave back in place of logits."""

    loss: Tensor
    sums: Sums | None
    given: Tensor


def _given_for(loss: Tensor) -> Tensor:
    """A stand-in where there can be one: not for a compiler, whose graphs know no such class, and
    not for tensors that are of a class already."""
    if torch.compiler.is_compiling() or type(loss) is not Tensor:
        return loss
    return loss.as_subclass(_StandIn)


#: Of fused networks whose loss is none of several resolutions; its own loss is not called.
_BY_DEFAULT = DeepSupervisionLoss(nn.Identity())


def _levels_of(loss: Any) -> tuple[LossModule, DeepSupervisionLoss]:
    """The loss of one head, and what weighs the heads."""
    if isinstance(loss, DeepSupervisionLoss):
        return _of_sums(loss.loss), loss
    return _of_sums(loss), _BY_DEFAULT


class FusedHead(nn.Module):
    """What :func:`fuse_head` returns."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossModule | HeadLoss | DeepSupervisionLoss | Callable[[Sums], Tensor],
        head: str | Sequence[str] | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if callable(loss) and not isinstance(loss, nn.Module):
            loss = SumsLoss(loss)
        _levels_of(loss)
        if chunk_bytes is None:
            inner = loss.loss if isinstance(loss, DeepSupervisionLoss) else loss
            chunk_bytes = inner.chunk_bytes if isinstance(inner, _OfFeatures) else CHUNK_BYTES
        self.model = model
        self.loss = loss
        self.chunk_bytes = chunk_bytes
        self.heads = find_heads(model) if head is None else _names(head)
        for name in self.heads:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"head: {type(model).__name__} has no module {name!r}") from None
            reason = _why_not_a_head(module)
            if reason is not None:
                raise ValueError(f"head: {name!r} {reason}")
        self._give_heads(_fusible_class)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def _give_heads(self, class_of: Callable[[type], type]) -> None:
        for name in self.heads:
            head: Any = self.model.get_submodule(name)
            head.__class__ = class_of(type(head))

    def unfuse(self) -> nn.Module:
        """Give the network's last layer its own class back, and return the network.

        This module then computes no loss any more; :func:`fuse_head` makes another.
        """
        self._give_heads(_plain_class)
        return self.model

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._give_heads(_fusible_class)  # copies and files hold the network's own layers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # copying must not find the network's own way
                raise
            return getattr(super().__getattr__("model"), name)

    def forward(
        self,
        input: Tensor,
        target: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        return_sums: bool = False,
        **options: Any,
    ) -> Any:
        r"""Return the loss, or without ``target`` what the network itself returns.

        Args:
            input: the network's input.
            target: labels or dense target. With several heads it is sampled down to each (nearest
                voxel centre), or there is one target a resolution, as nnU-Net gives them.
            mask: mask or voxel weights (B, [1,] \*spatial), at the input's resolution.
            annotated: which classes are annotated in which sample, bool (B, C).
            return_sums: return a pair with the :class:`voxfuse.Sums` of the finest head that
                counts.
            options: further arguments of the network.
        """
        heads = [self.model.get_submodule(name) for name in self.heads]
        if any(getattr(head, "loss_of", None) is not None for head in heads):
            raise RuntimeError(
                "a call of this network is under way (in another thread?), in which its head gives "
                "no logits; one call at a time"
            )
        if target is None:
            return self.model(input, **options)
        for name, head in zip(self.heads, heads, strict=True):
            if not isinstance(head, _Fusible):
                raise RuntimeError(f"head: {name!r} was unfused; call fuse_head again")
        inner, levels = _levels_of(self.loss)
        answers: list[_Answer] = []
        asked: list[nn.Module] = []

        def loss_of(head: nn.Module, features: Tensor) -> Tensor:
            asked.append(head)
            parameters: Any = head.weight
            classes = parameters.shape[0]
            logits = features[:, :1].expand(-1, classes, *features.shape[2:])  # their shape
            own = _target_of_level(target, features)
            own, own_mask = levels.at_level(own, mask, logits)
            result = head_loss(
                inner,
                features,
                parameters,
                head.bias,  # type: ignore[arg-type]
                own,
                own_mask,
                annotated=annotated,
                chunk_bytes=self.chunk_bytes,
                return_sums=return_sums,
            )
            value, sums = result if return_sums else (result, None)
            given = _given_for(value)
            answers.append(_Answer(value, sums, given))
            return given

        for head in heads:
            head.loss_of = loss_of  # type: ignore[assignment]
        try:
            output = self.model(input, **options)
        except _UsedError as error:
            raise ValueError(f"{self._not_last()} (it {error})") from None
        except Exception as error:
            unanswered = len(asked) > len(answers)
            if unanswered or not answers or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"{self._not_last()} ({type(error).__name__}: {error})") from error
        finally:
            for head in heads:
                head.loss_of = None  # type: ignore[assignment]
        outputs = self._untouched(output, answers)
        total: Tensor | None = None
        first: Sums | None = None
        for factor, answer in zip(levels.level_weights(len(outputs)), outputs, strict=True):
            if factor != 0:
                part = answer.loss if factor == 1 else factor * answer.loss
                if total is None:
                    first = answer.sums
                total = part if total is None else total + part
        if total is None:
            raise ValueError("loss: every output has weight 0")
        return (total, first) if return_sums else total

    def _untouched(self, output: Any, answers: list[_Answer]) -> list[_Answer]:
        """Those of the outputs, which must be what the heads gave, or fusing would be wrong."""
        if not answers:
            raise ValueError(f"head: {', '.join(self.heads)} did not take part in the forward pass")
        if isinstance(output, Tensor):
            output = [output]
        if not isinstance(output, (list, tuple)):
            raise ValueError(f"{self._not_last()} (it returns a {type(output).__name__})")
        own = []
        for term in output:
            found = [x for x in answers if x.given is term]
            if not found:
                raise ValueError(self._not_last())
            # Of what was given, since hooks of sharded layers may wait for its gradient; no view.
            loss = term.as_subclass(Tensor).clone() if isinstance(term, _StandIn) else term
            own.append(found[0]._replace(loss=loss))
        return own

    def _not_last(self) -> str:
        return (
            f"model: {type(self.model).__name__} does something to the output of "
            f"{', '.join(self.heads)} before it returns it; only a last layer can be fused"
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads!r}"


def _names(head: str | Sequence[str]) -> list[str]:
    return [head] if isinstance(head, str) else list(head)


def _target_of_level(target: Tensor | Sequence[Tensor], features: Tensor) -> Tensor:
    if isinstance(target, Tensor):
        return target
    size = features.shape[2:]
    fitting = [x for x in target if x.shape[x.ndim - len(size) :] == size]
    if fitting and all(x is fitting[0] for x in fitting):
        return fitting[0]
    shapes = [tuple(candidate.shape) for candidate in target]
    if not fitting:
        raise ValueError(f"target: none of {shapes} has the resolution {tuple(size)} of a head")
    raise ValueError(
        f"target: {len(fitting)} of {shapes} have the resolution {tuple(size)} of a head, and a "
        "target goes to a head by its resolution. Pass one tensor for all heads; heads of one "
        "resolution with targets of their own cannot be fused"
    )


def _trained(loss: nn.Module) -> set[str]:
    """The names in a state of what is trained of a loss: its options are no state."""
    return {f"loss.{name}" for name, _ in loss.named_parameters(remove_duplicate=False)}


def _without_prefix(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The state of the fused module is that of the network alone, under the same names, and what
    is trained of the loss."""
    kept = _trained(module.loss)
    for key in [key for key in state if key.startswith(f"{prefix}loss.")]:
        if key[len(prefix) :] not in kept:
            del state[key]
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        state[prefix + key[len(prefix) + len("model.") :]] = state.pop(key)


def _with_prefix(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Names of the network, or of the fused module's own ``named_parameters``."""
    network = module.model
    own = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
    trained = _trained(module.loss)
    given = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for key, value in given.items():
        name = key[len(prefix) :]
        prefixed = name.startswith("model.") and name[len("model.") :] in own
        bare = name in own or not (prefixed or name in trained)
        state[f"{prefix}model.{name}" if bare else key] = value
    for name, value in module.loss.state_dict().items():
        if f"loss.{name}" not in trained:
            state[f"{prefix}loss.{name}"] = value


def fuse_head(
    model: nn.Module,
    loss: LossModule | HeadLoss | DeepSupervisionLoss | Callable[[Sums], Tensor],
    *,
    head: str | Sequence[str] | None = None,
    chunk_bytes: int | None = None,
) -> FusedHead:
    """Join a network's last 1x1x1 convolution and its loss: training never makes the logits.

    The returned module computes the loss in training and logits as before without a target. It
    shares the network's parameters, and its ``state_dict`` is the network's own (with ``loss.`` and
    the parameters of a loss that is trained itself, a :class:`SumsLoss` of a module). The network
    stays usable by itself: only the class of its last convolution changes (to a subclass), until
    ``unfuse()`` of what is returned. Saved as a whole, copied or scripted it is as it was.

    ``named_parameters`` begin with ``model.``. ``load_state_dict`` takes both names;
    ``torch.func.functional_call`` only these, and ignores the others without a word.

    Works for networks that return what their last convolution gives: a Sequential, MONAI's
    DynUNet, SegResNet, BasicUNet, UNETR, SwinUNETR and nnU-Net's PlainConvUNet, with deep
    supervision too (DynUNet without: it resamples the logits). MONAI's UNet ends in a 3x3x3
    convolution and cannot be fused. Inside the network the logits must not be used, as by a gate:
    that is an error, which ``torch.compile`` sees only of what the network returns, so that a first
    call should be uncompiled. Checkpoint the network's layers before the head, or the fused module
    as a whole, but not the head inside. One thread at a time.

    Args:
        model: the network.
        loss: a loss that :func:`head_loss` takes, possibly inside a
            :class:`DeepSupervisionLoss`, whose weights then apply to the heads' losses; or a
            function of :class:`Sums`, see :class:`SumsLoss`.
        head: name of the last convolution, or names, where the network's last one in the order of
            ``named_modules`` is not it.
        chunk_bytes: most bytes of logits that exist at one time (default 64 MiB).

    Raises:
        ValueError: the last layer is not a 1x1x1 convolution, or (at the first call) the network
            uses the logits or does something to them before it returns them.
        TypeError: the loss is not made of sums over the voxels.

    Example:
        >>> import torch, voxfuse
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 100, 1)
        ... )
        >>> fused = voxfuse.fuse_head(model, voxfuse.DiceCELoss())
        >>> image, labels = torch.randn(1, 1, 8, 8, 8), torch.randint(0, 100, (1, 8, 8, 8))
        >>> fused(image, labels).backward()
        >>> fused(image).shape
        torch.Size([1, 100, 8, 8, 8])
    """
    return FusedHead(model, loss, head, chunk_bytes)
