"""What the autograd functions of the ops share: second derivatives, when to record a
call, and how an op comes to its derivatives and its vmap."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
)
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


def exporting() -> bool:
    """Whether torch.export or torch.jit.trace takes a graph, which outlives the grad mode of now.
    Not by torch.compiler.is_exporting(), which torch.compile folds to True in torch 2.11 (pytorch
    issue 176347)."""
    return torch.compiler._is_exporting_flag or _get_tracing_state() is not None


def takes_graph() -> bool:
    """Whether a graph is taken, which holds the op, derived by its Autograd kernel, and not the
    autograd function."""
    return is_compiling() or _get_tracing_state() is not None


def through_reference(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a function in plain PyTorch operations, for an op of the same meaning.

    Args:
        function: of the inputs, in order.
        inputs: None where there is none.
        needed: which of them take a gradient.
        grad_outputs: the gradients of the function's results, None for those not used.

    Returns:
        One for each of the inputs, None where not needed.
    """
    wanted = [i for i, t in enumerate(inputs) if t is not None and needed[i]]
    given = [i for i, g in enumerate(grad_outputs) if g is not None]
    grads: list[Tensor | None] = [None] * len(inputs)
    if not given or not wanted:
        return grads

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        everything = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            everything[i] = value
        outputs = function(*everything)
        return tuple(outputs[i] for i in given)

    # vjp and not autograd.grad, which torch.func's transforms refuse.
    vjp = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1]
    for i, g in zip(wanted, vjp(tuple(grad_outputs[i] for i in given)), strict=True):
        grads[i] = g
    return grads


def batched(grad_outputs: Iterable[Tensor | None]) -> bool:
    """Whether `torch.autograd.grad` maps over these gradients (`is_grads_batched`), as vectorised
    jacobians do. It maps no op that takes a list of tensors, and what it maps an autograd function
    over is no part of the graph: with `create_graph` only plain PyTorch operations are."""
    return any(g is not None and is_legacy_batchedtensor(g) for g in grad_outputs)


def only_plain_operations() -> bool:
    """Whether the context derives plain PyTorch operations alone, so that an op's reference has to
    take its place: only they carry tangents, can be traced by torch.compile inside a transform,
    and have a rule for torch.func.functionalize, which autograd functions lack."""
    transformed = _are_functorch_transforms_active()
    if forward_ad._current_level >= 0 or (transformed and is_compiling()):
        return True
    return transformed and any(
        each.key() == TransformType.Functionalize for each in get_interpreter_stack()
    )


def needs_grad(tensors) -> bool:
    """Whether autograd records what is done with these tensors, of which some may be None."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recorded(tensors) -> bool:
    """Whether a derivative of a call with these tensors may be asked for."""
    if forward_ad._current_level >= 0 or _are_functorch_transforms_active():
        return True
    return needs_grad(tensors)


def visible(function: Callable[P, R]) -> Callable[P, R]:
    """Shows calls of a function, which is no op, to a TorchFunctionMode, as `explain` has one."""

    @functools.wraps(function)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R:
        # None in the place of the tensors: a mode is asked, their classes are not.
        if not is_compiling() and has_torch_function((None,)):
            return handle_torch_function(shown, (None,), *args, **kwargs)
        return function(*args, **kwargs)

    return shown


@visible
def in_plain_operations(op: Any, reference: Callable[..., Any], *args: Any) -> Any:
    """What `op` would compute, by its reference; see `only_plain_operations`."""
    return reference(*args)


def register_rules(
    lib: torch.library.Library,
    op: Any,
    function: Any,
    places: Iterable[int],
    fold: Callable[..., Any],
) -> None:
    """Give an op of `lib` its Autograd kernel and its vmap rule.

    Args:
        function: the autograd function of the op's arguments, taken where autograd records one.
        places: of the arguments with a gradient.
        fold: (op, size of the new dimension, in_dims, arguments) -> (results, out_dims).
    """
    name, derived = op._schema.name, tuple(places)

    def kernel(keyset, *args):
        if needs_grad(args[i] for i in derived):
            return function.apply(*args)
        with _AutoDispatchBelowAutograd():
            return op(*args)

    lib.impl(name.removeprefix("seqkern::"), kernel, "Autograd", with_keyset=True)
    register_fold(lib, op, fold)


def register_fold(lib: torch.library.Library, op: Any, fold: Callable[..., Any]) -> None:
    """Give an op of `lib` its vmap rule, see `register_rules`."""
    torch.library.register_vmap(
        op._schema.name,
        lambda info, in_dims, *args: fold(op, info.batch_size, in_dims, args),
        lib=lib,
    )
