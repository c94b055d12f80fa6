"""Finds linear layers whose parent computes with their weight instead of calling them: adapters have no effect there.

`torch.nn.MultiheadAttention` passes `self.out_proj.weight` to a function, and the Mamba mixers pass the weights of
`x_proj` and `out_proj` to a fused kernel in training. An adapter on such a layer is never called, or not on every
path, and neither PyTorch nor PEFT reports it. PEFT refuses LoRA on `out_proj` in five Mamba architectures, by name
(`_check_lora_target_modules_mamba`). Here the source of the parent's class decides, which covers other architectures
and custom modules too: a read of `self.<child>.weight` counts if code that `forward` reaches computes with its value.
Reads of its dtype, device or shape don't count, nor do tests, nor reads on a path that the model's settings switch off
(`pretraining_tp` in BLOOM). Reads that the source does not show (`getattr` with a computed name, `parameters()`) are
not found.

Three steps: `_reachable` collects the methods that `forward` may call, `_Scan` follows modules and weights through the
source of each as paths (`("stack", "*", "weight")`), and `_resolve` finds the layers of a model at these paths.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


_ANY, _WEIGHT = "*", "weight"
# Attributes and methods that describe a weight.
_DESCRIBES = frozenset(
    "dtype device shape ndim size numel dim requires_grad is_cuda is_meta is_contiguous is_floating_point data_ptr "
    "element_size stride nbytes itemsize layout grad".split()
)
# Functions and methods that use only the type, dtype, device or shape of a weight, or print it.
_ASKS = frozenset(
    "isinstance hasattr getattr setattr type id len to type_as view_as expand_as zeros_like empty_like ones_like "
    "full_like rand_like randn_like print info debug warning warning_once".split()
)
# Calls whose result has the same elements.
_ITERATES = frozenset("enumerate reversed list tuple iter values items children next zip".split())
# Reads that don't count, by class and child: no model of transformers (5.23) passes `query_states` to DeBERTa's
# attention, and RWKV rescales the weights of layers that it calls.
_UNUSED = frozenset(
    (
        ("DisentangledSelfAttention", ("in_proj",)),
        ("RwkvModel", ("blocks", _ANY, "attention", "output")),
        ("RwkvModel", ("blocks", _ANY, "feed_forward", "value")),
    )
)
# Syntax of a test of a module's settings.
_TEST: tuple[type[ast.AST], ...] = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp)
_TEST += (ast.Not, ast.expr_context, ast.cmpop, ast.boolop)
Path = tuple[str, ...]
Names = frozenset[tuple[str, frozenset[Path]]]


class _Condition(NamedTuple):
    test: ast.expr
    holds: bool  # the read runs if the test is true, or if it is false


class _Read(NamedTuple):
    """A read of a weight: the path from the module to the layer (`"*"` for an index), and its conditions."""

    path: Path
    conditions: tuple[_Condition, ...]


def bypassed_layers(model: nn.Module, is_linear: Callable[[nn.Module], bool]) -> dict[str, type]:
    """
    The linear layers of a model whose weight some parent computes with, instead of calling them.

    Args:
        model (`torch.nn.Module`): The model, with adapters or without.
        is_linear (`Callable`): Whether a module is a linear layer.

    Returns:
        `dict[str, type]`: The class that reads the weight, by the name of the layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parents = [m for m in model.modules() if not isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    types: list[type] = [type(module) for module in parents]
    methods = _reachable(types)

    readers = {}
    for module, cls in zip(parents, types, strict=True):
        for read in (read for method in methods[cls] for read in _reads_in(cls, method)):
            if not all(_may_hold(condition, module) for condition in read.conditions):
                continue
            for layer in _resolve(module, read.path):
                if is_linear(layer) or isinstance(layer, BaseTunerLayer):
                    readers[names[id(layer)]] = cls
    return readers


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules at the end of a path."""
    if not path:
        yield module
        return
    # Wrappers of PEFT forward the attributes of their layer.
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    children = module.children() if path[0] == _ANY else [module._modules.get(path[0])]
    for child in children:
        if child is not None:
            yield from _resolve(child, path[1:])


def _reachable(classes: Iterable[type]) -> dict[type, list[FunctionType]]:
    """The methods of each class that `forward` of any of them may call, judged by the names in the code."""
    waiting = {cls: list(_methods_of(cls)) for cls in classes}
    reached: dict[type, list[FunctionType]] = {cls: [] for cls in waiting}
    names, before = {"forward", "__call__"}, 0
    while len(names) > before:
        before = len(names)
        for cls, methods in waiting.items():
            new = [method for name, method in methods if name in names]
            waiting[cls] = [(name, method) for name, method in methods if name not in names]
            reached[cls] += new
            for method in new:
                names |= _names_in(method)
    return reached


@lru_cache(maxsize=4096)
def _methods_of(cls: type) -> tuple[tuple[str, FunctionType], ...]:
    """The functions of a class by name, with those of its parents that they override and call by `super`."""
    methods_by_name: dict[str, list[FunctionType]] = {}
    for base in inspect.getmro(cls):
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = _function(value)
            if function is not None and all("super" in _names_in(method) for method in methods_by_name.get(name, ())):
                methods_by_name.setdefault(name, []).append(function)
    return tuple((name, method) for name, methods in methods_by_name.items() for method in methods)


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property or a decorator."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = value.func if isinstance(value, cached_property) else value
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


@lru_cache(maxsize=65536)
def _names_in(function: FunctionType) -> frozenset[str]:
    """The names of attributes and globals in a function and in the functions of its module that it calls."""
    names: set[str] = set()
    codes = [(function.__code__, function.__globals__)]
    done: set[CodeType] = set()
    while codes:
        code, values = codes.pop()
        if code in done:
            continue
        done.add(code)
        names.update(code.co_names)
        codes += [(constant, values) for constant in code.co_consts if isinstance(constant, CodeType)]
        called = [values[name] for name in code.co_names if isinstance(values.get(name), FunctionType)]
        codes += [(helper.__code__, helper.__globals__) for helper in called]
    return frozenset(names)


@lru_cache(maxsize=16384)
def _reads_in(cls: type, method: FunctionType) -> tuple[_Read, ...]:
    """The reads of weights that a method of a class computes with."""
    # Parsing the source is slow, and few methods read weights.
    followed = [other for name, other in _methods_of(cls) if name in _names_in(method)]
    if not any(_WEIGHT in _names_in(function) for function in (method, *followed)):
        return ()
    reads = _scan(cls, method, frozenset({(_first_of(method), frozenset({()}))})).reads
    owner = method.__qualname__.split(".")[0]
    return tuple(read for read in reads if (owner, read.path) not in _UNUSED)


def _first_of(function: FunctionType) -> str:
    return next(iter(function.__code__.co_varnames), "")


@lru_cache(maxsize=16384)
def _scan(cls: type, function: FunctionType, names: Names, callers: tuple[FunctionType, ...] = ()) -> _Scan:
    return _Scan(cls, function, names, callers)


class _Scan:
    """
    The reads in a function, and the paths of its return values.

    A path leads from the module to one of its submodules, or to the weight of that. A value that is derived from one
    weight only has the path of the weight.

    Args:
        cls (`type`): Class of the module.
        function (`FunctionType`): A method, or a function that it calls.
        names (`frozenset`): Local names of modules and weights, with the paths of each.
        callers (`tuple[FunctionType, ...]`): The chain of calls that leads to it.
    """

    def __init__(self, cls: type, function: FunctionType, names: Names, callers: tuple[FunctionType, ...]) -> None:
        self.cls, self.function, self.callers = cls, function, (*callers, function)
        self.names = {name: set(paths) for name, paths in names}
        self.reads: list[_Read] = []
        self.returned: set[Path] = set()
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return  # a function without source is assumed to call its layers

        nodes = list(ast.walk(tree))
        self.parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        for _ in range(3):  # names may refer to other names
            for node in nodes:
                self._note_names(node)

        for node in nodes:
            if isinstance(node, ast.Return) and node.value is not None:
                self.returned |= self._paths_of(node.value)
            elif isinstance(node, ast.expr):
                self.reads += self._reads_at(node)

    def _reads_at(self, node: ast.expr) -> list[_Read]:
        weights = {path[:-1] for path in self._paths_of(node) if _is_weight(path)} - {()}
        reads = [_Read(path, ()) for path in weights if self._computes_with(node)]
        called = self._called(node)
        conditions = tuple(_conditions(node, self.parents))
        return [
            _Read(path, (*conditions, *inner)) for path, inner in [*reads, *(() if called is None else called.reads)]
        ]

    def _note_names(self, node: ast.AST) -> None:
        """Add local names of modules and weights: `proj = self.proj`, `for layer in self.layers`."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind(node.target, node.iter, elements=True)

    def _bind(self, target: ast.expr, value: ast.expr, elements: bool = False) -> None:
        if isinstance(target, ast.Name):
            paths = self._elements_of(value) if elements else self._paths_of(value)
            if paths:
                self.names.setdefault(target.id, set()).update(paths)
        elif isinstance(target, ast.Tuple | ast.List):
            called = _name_of(value.func) if isinstance(value, ast.Call) else ""
            values = [value] * len(target.elts)
            if isinstance(value, ast.Call) and elements and called in ("zip", "enumerate"):
                values = value.args if called == "zip" else value.args[:1] * len(target.elts)
            elif isinstance(value, ast.Tuple | ast.List) and not elements:
                values = value.elts
            each = elements or values[:1] == [value]
            for name, part in zip(target.elts, values, strict=False):
                self._bind(name, part, each)

    def _elements_of(self, node: ast.expr) -> set[Path]:
        if isinstance(node, ast.Tuple | ast.List):
            return set().union(*map(self._paths_of, node.elts))
        if isinstance(node, ast.Call) and _name_of(node.func) in _ITERATES:
            over = node.args or ([node.func.value] if isinstance(node.func, ast.Attribute) else [])
            return set().union(*map(self._elements_of, over))
        return {path if _is_weight(path) else (*path, _ANY) for path in self._paths_of(node)}

    def _paths_of(self, node: ast.AST) -> set[Path]:
        """The paths of `self.a.b[i]`, its weight and values derived from that; none for other expressions."""
        called = self._called(node)
        if called is not None:
            return called.returned
        match node:
            case ast.Name(id=name):
                return self.names.get(name, set())
            case ast.Attribute(value=value, attr=name):
                return self._below(value, name)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=name), *_]):
                return self._below(value, str(name))
            case ast.Subscript(value=value, slice=index):
                return self._paths_of(value) if isinstance(index, ast.Slice) else self._below(value, _ANY)
            case ast.Call(func=ast.Name(id="next")):
                return self._elements_of(node)
            case ast.Call(func=function):
                return set(filter(_is_weight, self._paths_of(function)))
            case ast.NamedExpr(value=value):
                return self._paths_of(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self._paths_of(body) | self._paths_of(orelse)
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.BoolOp(values=elements):
                return {path for element in elements for path in self._paths_of(element) if _is_weight(path)}
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return set(filter(_is_weight, self._paths_of(element)))
        return set()

    def _below(self, node: ast.expr, name: str) -> set[Path]:
        paths = self._paths_of(node)
        weights = set(filter(_is_weight, paths))
        return {(*path, name) for path in paths - weights} | (weights if name not in _DESCRIBES else set())

    def _called(self, node: ast.AST) -> _Scan | None:
        """The function that a call or property runs, if it gets a weight, or a module and reads a weight."""
        call = node if isinstance(node, ast.Call) else None
        named = node if call is None else call.func
        function: FunctionType | None = None
        leading: list[set[Path]] = []  # the paths of `self`

        # A method or property of the module, or a function of the same source file.
        if isinstance(named, ast.Attribute) and () in self._paths_of(named.value):
            value = inspect.getattr_static(self.cls, named.attr, None)
            if (call is None) != isinstance(value, FunctionType):
                function, leading = _function(value), [{()}]
        elif isinstance(named, ast.Name) and call is not None:
            helper = self.function.__globals__.get(named.id)
            # The replacement of a decorated function (a kernel from the Hub) may do more with a weight.
            function = helper if isinstance(helper, FunctionType) and not hasattr(helper, "__wrapped__") else None
        if function is None or function in self.callers or len(self.callers) > 4:
            return None

        # Its parameters become names of modules and weights.
        arguments = call.args if call else []
        passed = dict(zip(function.__code__.co_varnames, [*leading, *map(self._paths_of, arguments)], strict=False))
        passed |= {str(word.arg): self._paths_of(word.value) for word in (call.keywords if call else ())}
        names = frozenset((name, frozenset(paths)) for name, paths in passed.items() if paths)
        reads = _WEIGHT in _names_in(function) or any(_is_weight(path) for _, paths in names for path in paths)
        return _scan(self.cls, function, names, self.callers) if names and reads else None

    def _computes_with(self, node: ast.AST) -> bool:
        """Whether a value derived from a weight enters another value, rather than being described or tested."""
        parent = self.parents[node]
        while isinstance(parent, ast.keyword | ast.Starred | ast.Dict):
            node, parent = parent, self.parents[parent]
        if self._is_tested(node):
            return False
        match parent:
            case ast.Attribute() | ast.IfExp() | ast.BoolOp() | ast.NamedExpr():
                return False  # the parent is examined on its own
            case ast.Tuple() | ast.List() | ast.ListComp() | ast.GeneratorExp():
                return False
            case ast.Subscript(value=value):
                return node is not value
            case ast.Call(func=function):
                name = _name_of(function)
                passes_on = name in _ASKS | _ITERATES or name.endswith("_") or self._called(parent) is not None
                return node is not function and not passes_on
            case ast.Compare(ops=operations):
                return not all(isinstance(operation, ast.Is | ast.IsNot) for operation in operations)
            case ast.Assign(targets=targets):
                return not all(isinstance(target, ast.Name | ast.Tuple | ast.List) for target in targets)
        return not isinstance(parent, ast.Expr | ast.Return | ast.For | ast.comprehension | ast.AnnAssign)

    def _is_tested(self, node: ast.AST) -> bool:
        while not isinstance(node, ast.stmt):
            node, parent = self.parents[node], node
            if isinstance(node, ast.Assert | ast.FormattedValue) or parent is getattr(node, "test", None):
                return True
        return False


def _is_weight(path: Path) -> bool:
    return path[-1:] == (_WEIGHT,)


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[_Condition]:
    """The tests around a node; a conjunction is split into its parts."""
    while node in parents:
        node, parent = parents[node], node
        if isinstance(node, ast.If | ast.IfExp) and parent is not node.test:
            holds = parent is node.body or (isinstance(node, ast.If) and parent in node.body)
            splits = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And if holds else ast.Or)
            for part in node.test.values if splits and isinstance(node.test, ast.BoolOp) else [node.test]:
                yield _Condition(part, holds)


def _may_hold(condition: _Condition, module: nn.Module) -> bool:
    """Whether a condition may hold: by the settings of a module, or because it can change from call to call."""
    for node in ast.walk(condition.test):
        named = node.id if isinstance(node, ast.Name) else "self"
        if not isinstance(node, _TEST) or named != "self" or getattr(node, "attr", None) == "training":
            return True
    try:
        value = eval(compile(ast.Expression(condition.test), "<test>", "eval"), {"__builtins__": {}, "self": module})
    except Exception:  # properties of the module may raise anything
        return True
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return not is_plain or bool(value) == condition.holds
