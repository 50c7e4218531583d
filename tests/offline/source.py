"""The source of a kernel as a Python function, with the meaning that Triton's compiler gives it.

What is assigned becomes a tensor, and so does a loop's variable; `and`, `or`, `not` and conditions
look at the values of scalars, where Python would ask whether there is an object; what the compiler
refuses of these is refused.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.jit import JITFunction, get_jit_fn_file_line

from tests.offline.builder import SEMANTIC, Handle, numpy_dtype


def raw(value: Any) -> Any:
    """The value of a constexpr, and anything else as it is."""
    return value.value if isinstance(value, tl.constexpr) else value


def scalar(value: bool | int | float, dtype: tl.dtype) -> tl.tensor:
    """A tensor without dimensions."""
    array = np.array([value], dtype=numpy_dtype(dtype))
    return tl.tensor(Handle(array, dtype), dtype)


# ---- what the words of the language mean


def assigned(value: Any) -> Any:
    """A value as the compiler binds it to a name: numbers and constants become tensors."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(assigned, value))
    return SEMANTIC.to_tensor(value, check_type=False)


def condition(value: Any) -> bool:
    """The truth of a scalar or of a constant."""
    if not isinstance(value, tl.tensor):
        return bool(value)
    if value.type.is_block():
        raise TypeError(f"a condition must be a scalar; this is a block of shape {value.shape}")
    return bool(value.handle.data.item())


def junction(conjunctive: bool, *operands: Callable[[], Any]) -> Any:
    """`and` or `or`: constants may decide it early, tensors are combined by element."""
    tensors, value = [], None
    for operand in operands:
        value = operand()
        if isinstance(value, tl.tensor):
            tensors.append(value)
        elif bool(value) != conjunctive:
            return value
    if not tensors:
        return value
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result.logical_and(tensor) if conjunctive else result.logical_or(tensor)
    return result


def negation(value: Any) -> Any:
    return value.__not__() if isinstance(value, tl.tensor) else not value


def loop(start: Any, stop: Any = None, step: Any = 1, **hints: Any) -> Iterator[tl.tensor]:
    """`range` and `tl.range`: the variable is a tensor; the hints change no value."""
    bounds = (0, start, step) if stop is None else (start, stop, step)
    wide = any(isinstance(n, tl.tensor) and n.dtype == tl.int64 for n in bounds)
    for i in range(*(int(raw(n)) for n in bounds)):
        yield scalar(i, tl.int64 if wide else tl.int32)


def static_assert(met: Any, message: str = "") -> None:
    assert condition(met), message


WORDS = {
    "assigned": assigned,
    "condition": condition,
    "junction": junction,
    "negation": negation,
    "range": loop,
}


# ---- the rewritten function


class Rewriter(ast.NodeTransformer):
    """Puts calls of the functions above where the compiler departs from Python."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        self.generic_visit(node)
        node.value = self._call("assigned", node.value)
        return node

    def visit_If(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.test = self._call("condition", node.test)
        return node

    visit_IfExp = visit_While = visit_If

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        nothing = ast.arguments([], [], None, [], [], None, [])
        operands = [ast.Lambda(nothing, operand) for operand in node.values]
        return self._call("junction", ast.Constant(isinstance(node.op, ast.And)), *operands)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return self._call("negation", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) > 1:
            raise NotImplementedError(f"a chain of comparisons: {ast.unparse(node)}")
        return node

    @staticmethod
    def _call(function: str, *arguments: ast.expr) -> ast.expr:
        return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


REWRITTEN: dict[Callable, Callable] = {}


def rewritten(kernel: JITFunction) -> Callable:
    """The kernel as a Python function; its globals stay those of its module."""
    if kernel.fn not in REWRITTEN:
        REWRITTEN[kernel.fn] = _rewrite(kernel)
    return REWRITTEN[kernel.fn]


def _rewrite(kernel: JITFunction) -> Callable:
    local = WORDS | inspect.getclosurevars(kernel.fn).nonlocals
    tree = ast.parse(f"def make({', '.join(local)}):\n  return {kernel.__name__}")
    function = Rewriter().visit(kernel.parse()).body[0]
    file, line = get_jit_fn_file_line(kernel)
    ast.increment_lineno(function, line - 1)
    tree.body[0].body.insert(0, function)
    namespace: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(tree), file, "exec")
    exec(code, kernel.fn.__globals__, namespace)
    return namespace["make"](**local)


def call_helper(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A jit function called by a kernel; parameters that are constants come as plain values."""
    bound = kernel.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    constant = {p.name for p in kernel.params if p.is_constexpr}
    given = {name: raw(v) if name in constant else v for name, v in bound.arguments.items()}
    return rewritten(kernel)(**given)
