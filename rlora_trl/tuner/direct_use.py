"""Linear layers whose parent computes with their weight instead of calling them: an adapter there would do nothing.

`torch.nn.MultiheadAttention` passes `self.out_proj.weight` to a function, and the Mamba mixers pass the weights of
`x_proj` and `out_proj` to a fused kernel in training. An adapter on such a layer is never called, or not on every
path, and neither PyTorch nor PEFT reports it. PEFT refuses LoRA on `out_proj` in five Mamba architectures, by name
(`_check_lora_target_modules_mamba`). Here the source of the parent's class decides, which covers other architectures
and custom modules too: a read of `self.<child>.weight` counts if its value is computed with. Reads of its dtype,
device or shape don't count, nor do reads on a path that the model's settings switch off (`pretraining_tp` in BLOOM).
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


# Attributes and methods that describe a weight.
_DESCRIBES = frozenset(
    "dtype device shape ndim size numel dim requires_grad is_cuda is_meta is_contiguous is_floating_point data_ptr "
    "element_size stride nbytes itemsize layout grad data".split()
)
# Functions and methods that take from a weight no more than its type, dtype, device or shape.
_ASKS = frozenset(
    "isinstance hasattr getattr setattr type id len to type_as view_as expand_as zeros_like empty_like ones_like "
    "full_like rand_like randn_like".split()
)
# Methods that no forward pass runs, by how their names begin (without leading underscores).
_SETUP = (
    "init",
    "reset",
    "post_init",
    "tie",
    "resize",
    "load",
    "save",
    "set_",
    "from_",
    "extra_repr",
    "repr",
    "quantize",
)
# Reads on a path that no model takes: class and child. `query_states` is passed to DeBERTa's attention by none of
# transformers' models (5.23).
_UNUSED = frozenset({("DisentangledSelfAttention", ("in_proj",))})
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ANY = "*"
Path = tuple[str, ...]


class _Unknown:
    """The value of an expression that depends on more than the settings of a module."""


_UNKNOWN = _Unknown()


class _Condition(NamedTuple):
    test: ast.expr
    holds: bool  # the read runs if the test is true, or if it is false


class _Read(NamedTuple):
    """A read of a weight: the path from the module to the layer (`"*"` for an index), and what it depends on."""

    path: Path
    conditions: tuple[_Condition, ...]


def bypassed_layers(model: nn.Module, is_linear: Callable[[nn.Module], bool]) -> dict[str, str]:
    """
    The linear layers of a model that some parent computes with instead of calling.

    Args:
        model (`torch.nn.Module`): The model, with adapters or without.
        is_linear (`Callable`): Whether a module is a linear layer.

    Returns:
        `dict[str, str]`: The class that reads the weight, by the name of the layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        cls: type = type(module)
        for read in _reads_of(cls):
            if not all(_may_hold(condition, module) for condition in read.conditions):
                continue
            for layer in _resolve(module, read.path):
                if is_linear(layer) or isinstance(layer, BaseTunerLayer):
                    found[names[id(layer)]] = type(module).__name__
    return found


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules at the end of a path."""
    if not path:
        yield module
        return
    # What wraps a layer hands its attributes on.
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    children = module.children() if path[0] == _ANY else [module._modules.get(path[0])]
    for child in children:
        if child is not None:
            yield from _resolve(child, path[1:])


@lru_cache(maxsize=4096)
def _reads_of(cls: type) -> tuple[_Read, ...]:
    """The reads of weights in the methods that a class runs."""
    seen: set[str] = set()
    reads: list[_Read] = []
    for base in inspect.getmro(cls):
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if not isinstance(function, FunctionType) or name in seen:
                continue
            seen.add(name)
            if not name.lstrip("_").startswith(_SETUP) and _names_weight(function.__code__):
                reads += [read for read in _reads_in(function) if (base.__name__, read.path) not in _UNUSED]
    return tuple(reads)


def _names_weight(code: CodeType) -> bool:
    """Whether code, or a function in it, has an attribute `weight`: few do, and parsing the source takes long."""
    return "weight" in code.co_names or any(
        isinstance(constant, CodeType) and _names_weight(constant) for constant in code.co_consts
    )


def _reads_in(function: FunctionType) -> list[_Read]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []  # without its source, a class is taken as one that calls its layers
    definition = tree.body[0] if tree.body else None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return []

    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    known: dict[str, set[Path]] = {definition.args.args[0].arg: {()}}
    for node in ast.walk(tree):
        _note_names(node, known)
    reads = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            paths = _paths_of(node.value, known) - {()}
            if paths and not _only_describes(node, parents):
                reads += [_Read(path, tuple(_conditions(node, parents))) for path in paths]
    return reads


def _note_names(node: ast.AST, known: dict[str, set[Path]]) -> None:
    """Add a name that stands for a module, maybe one of several: `proj = self.proj`, `for layer in self.layers`."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        name, paths = node.targets[0].id, _paths_of(node.value, known)
    elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
        name, paths = node.target.id, {(*path, _ANY) for path in _paths_of(node.iter, known)}
    else:
        return
    if paths:
        known.setdefault(name, set()).update(paths)


def _paths_of(node: ast.expr, known: dict[str, set[Path]]) -> set[Path]:
    """The paths from the module of `self.a.b[i]`, none for other expressions."""
    if isinstance(node, ast.Name):
        return set(known.get(node.id, ()))
    if isinstance(node, ast.Attribute | ast.Subscript):
        end = node.attr if isinstance(node, ast.Attribute) else _ANY
        return {(*path, end) for path in _paths_of(node.value, known)}
    return set()


def _only_describes(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether what is taken from a weight is its type, dtype, device or shape; or it is changed in place."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr in _DESCRIBES or parent.attr.endswith("_")
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    if isinstance(parent, ast.Call) and node is not parent.func:
        function = parent.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        return name in _ASKS
    return isinstance(parent, ast.Expr)


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[_Condition]:
    """The tests around a node."""
    while node in parents:
        node, parent = parents[node], node
        if isinstance(node, ast.If):
            if parent is not node.test:
                yield _Condition(node.test, parent in node.body)
        elif isinstance(node, ast.IfExp) and parent is not node.test:
            yield _Condition(node.test, parent is node.body)


def _may_hold(condition: _Condition, module: nn.Module) -> bool:
    value = _evaluate(condition.test, module)
    return value is _UNKNOWN or bool(value) == condition.holds


def _evaluate(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression of a module's settings; `_UNKNOWN` for whatever can change from call to call."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _evaluate(node.operand, module)
        return _UNKNOWN if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        return _evaluate_both(node, [_evaluate(value, module) for value in node.values])
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _evaluate(node.left, module), _evaluate(node.comparators[0], module)
        compare = _COMPARE.get(type(node.ops[0]))
        if left is _UNKNOWN or right is _UNKNOWN or compare is None:
            return _UNKNOWN
        try:
            return compare(left, right)
        except TypeError:
            return _UNKNOWN
    return _setting(node, module)


def _evaluate_both(node: ast.BoolOp, values: list[Any]) -> Any:
    decisive = isinstance(node.op, ast.Or)  # one true value decides an "or", one false value an "and"
    known = [value for value in values if value is not _UNKNOWN]
    if any(bool(value) == decisive for value in known):
        return decisive
    return not decisive if len(known) == len(values) else _UNKNOWN


def _setting(node: ast.expr, module: nn.Module) -> Any:
    """The value of `self.config.a` or `self.a`, where it is a plain number, text, truth value or `None`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id != "self" or not names or names[-1] == "training":
        return _UNKNOWN
    value: Any = module
    for name in names:
        if not hasattr(value, name):
            return _UNKNOWN
        value = getattr(value, name)
    return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
