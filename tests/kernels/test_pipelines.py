"""No product of a pipelined loop stands in a branch that is taken at run time.

Triton's pipeliner refills the buffer of an operand as if such a product had been taken: a race on a GPU that neither
the interpreter nor a compiler shows.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface

from hilora.kernels.overlaps import triton as overlaps
from hilora.kernels.stacked_linear import slots
from hilora.kernels.stacked_linear import triton as stacked_linear

KERNELS = {
    name: value.fn
    for module in (overlaps, slots, stacked_linear)
    for name, value in vars(module).items()
    if isinstance(value, KernelInterface)
}


def called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def loops(tree: ast.AST) -> list[ast.For]:
    """Those that are pipelined: innermost ones, but for those that are unrolled."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.For) and called(node.iter) == "range"]
    return [loop for loop in found if not any(other in found for other in ast.walk(loop) if other is not loop)]


def faults(source: str) -> list[str]:
    """The run-time conditions under which a pipelined loop of a kernel takes a product."""
    (function,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args.args
    constant = {arg.arg for arg in arguments if arg.annotation and "constexpr" in ast.unparse(arg.annotation)}
    for node in ast.walk(function):
        if isinstance(node, ast.For) and called(node.iter) == "static_range" and isinstance(node.target, ast.Name):
            constant.add(node.target.id)

    def known(condition: ast.expr) -> bool:
        if isinstance(condition, ast.Compare) and isinstance(condition.ops[0], (ast.Is, ast.IsNot)):
            return True
        inside_len = {id(name) for call in ast.walk(condition) if called(call) == "len" for name in ast.walk(call)}
        names = [node for node in ast.walk(condition) if isinstance(node, ast.Name) and id(node) not in inside_len]
        return all(name.id in constant for name in names)

    return [
        ast.unparse(branch.test)
        for loop in loops(function)
        for branch in ast.walk(loop)
        if isinstance(branch, (ast.If, ast.IfExp, ast.While))
        and not known(branch.test)
        and any(called(node) == "dot" for node in ast.walk(branch))
    ]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_no_product_of_a_pipelined_loop_is_in_a_branch_taken_at_run_time(kernel: Any) -> None:
    assert faults(inspect.getsource(kernel)) == []


def test_the_rule_is_checked() -> None:
    kernel = """
    @triton.jit
    def kernel(x, N: tl.constexpr, ON: tl.constexpr):
        for j in range(0, N):
            if j > 0:
                for c in tl.static_range(2):
                    for n in range(0, N):
                        if CONDITION:
                            acc = tl.dot(n, n, acc)
    """
    for condition in ("ON > 0", "ON and c == 1", "x is not None", "len(x) > ON"):
        assert faults(kernel.replace("CONDITION", condition)) == []
    for condition in ("j > 0", "(c == 1) & (n > ON)", "tl.program_id(0) == c", "x > 0"):
        assert faults(kernel.replace("CONDITION", condition)) == [condition]
