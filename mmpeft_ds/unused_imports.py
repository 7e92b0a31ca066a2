"""Stand-ins for modules that libraries import at their top and that training hardly ever uses.

transformers, peft and DeepSpeed import torch's compiler and the algebra of its symbolic shapes, and with them sympy,
onnx and inductor: 80 MiB in every process, and a second of its start. DeepSpeed asks Triton whether a GPU is there
when an engine is made: 67 MiB more. `stand_in` puts a module of the same name in the place of each. It has the names
that are taken from it when other modules are imported (`MEMBERS`); whoever asks it for anything else, or for a
submodule, gets that of the real module, which is imported at that moment and takes the place of its stand-in for good.
So what another torch or transformers does differently costs the memory again, and no more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import operator
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

COMPILER = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"
ALGEBRA = "sympy"
TRITON = "deepspeed.ops.triton_ops._triton"  # whether DeepSpeed's Triton kernels can run
INDEX_MODE = f"{COMPILER}._trace_wrapped_higher_order_op"  # a part of the compiler that masks of transformers use
_LOCK = threading.RLock()
_repeat: list[Callable[[], Any]] = []  # what the compiler has to be told once it is there


def stand_in() -> None:
    """Put the stand-ins in the place of the modules, unless they have been imported already.

    torch must have been imported; the libraries that import the modules should not have been. Where torch is built for
    an accelerator, Triton has no stand-in.
    """
    for family, names in FAMILIES.items():
        if family == TRITON and sys.modules["torch"].accelerator.current_accelerator() is not None:
            continue
        if not any(name in sys.modules for name in names):
            for name in names:
                sys.modules[name] = _StandIn(name)
            for name in names:
                if name.partition(".")[0] not in sys.modules:
                    continue  # nothing has the package yet, and `sys.modules` is asked first
                package, own = _place(name)
                if package is not None:
                    setattr(package, own, sys.modules[name])
            if family == COMPILER:
                _compile_later()
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def load(name: str) -> types.ModuleType:
    """The real module, imported now if it was not; its family has no stand-ins any more."""
    with _LOCK:
        family = next(names for names in FAMILIES.values() if name in names)
        leaving = [(other, sys.modules[other]) for other in family if isinstance(sys.modules.get(other), _StandIn)]
        for other, module in reversed(leaving):  # a package after its modules
            package, own = _place(other)
            if package is not None and vars(package).get(own) is module:
                delattr(package, own)
            del sys.modules[other]
        real = importlib.import_module(name)
        if leaving:
            _hand_over(leaving)
        return real


def is_real(name: str) -> bool:
    """Whether the module itself has been imported."""
    return name in sys.modules and not isinstance(sys.modules[name], _StandIn)


def _hand_over(leaving: list[tuple[str, types.ModuleType]]) -> None:
    """Put real members in the place of those that modules took from the stand-ins."""
    for name, stand_in in leaving:
        real = importlib.import_module(name)
        for member in MEMBERS[name]:
            theirs = vars(stand_in)[member]
            if theirs is None or theirs is False:
                continue  # the real module has the same on a machine without an accelerator
            for module in (stand_in, *sys.modules.values()):
                if getattr(module, "__dict__", {}).get(member) is theirs:
                    setattr(module, member, getattr(real, member))
    if leaving[0][0] == COMPILER:
        while _repeat:
            _repeat.pop(0)()


class _StandIn(types.ModuleType):
    """A module that has some of the members of the real one, and takes the others from it."""

    __path__: list[str] = []  # of a package; `_Finder` comes before those who would look into it

    def __init__(self, name: str):
        super().__init__(name, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(self).update({member: make(name, member) for member, make in MEMBERS[name].items()})

    def __getattr__(self, name: str) -> Any:
        # `__file__` and the like are asked for by those who walk over all modules.
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return getattr(load(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder):
    """Has the real module imported before a submodule of a stand-in, and then finds what that import has left."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that is there already; None of one that has no stand-in for its package."""
        package = name.rpartition(".")[0]
        if not isinstance(sys.modules.get(package), _StandIn):
            return None
        load(package)
        return importlib.machinery.ModuleSpec(name, _Imported(importlib.import_module(name)))


class _Imported(importlib.abc.Loader):
    """Loader of a module that has been imported."""

    def __init__(self, module: types.ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


_FINDER = _Finder()


# ------------------------------------------------------------------------------- members, made of (module, member)


def _function(module: str, member: str) -> Callable[..., Any]:
    """A function that imports its module when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(load(module), member)(*args, **kwargs)

    return call


def _guard(module: str, member: str) -> Callable[..., Any]:
    """What `guard_or_false` and the like give: a plain bool as it is, and a symbolic one by the real function."""

    def guard(value: Any) -> bool:
        return value if isinstance(value, bool) else getattr(load(module), member)(value)

    return guard


def _constant(value: bool | None) -> Callable[[str, str], bool | None]:
    """Makes a member that is `value`."""
    return lambda module, member: value


def _no(module: str, member: str) -> Callable[[], bool]:
    """`is_triton_available` where torch is built for no accelerator."""
    return lambda: False


def _nested(module: str, member: str) -> Callable[[Any], bool]:
    """`is_nested_int`: false of a plain number."""
    return lambda size: not isinstance(size, int) and getattr(load(module), member)(size)


def _joined(module: str, member: str) -> Callable[..., Any]:
    """`sym_and` and `sym_or`, which apply the operator, whatever the values are."""
    join = operator.and_ if member == "sym_and" else operator.or_
    return lambda first, *others: functools.reduce(join, others, first)


def _equal(module: str, member: str) -> Callable[[Any, Any], Any]:
    """`sym_eq`: of plain sizes their comparison."""

    def equal(one: Any, other: Any) -> Any:
        sizes = isinstance(one, (tuple, list)) and isinstance(other, (tuple, list))
        if sizes and all(isinstance(size, int) for size in (*one, *other)):
            return tuple(one) == tuple(other)
        return getattr(load(module), member)(one, other)

    return equal


def _class(module: str, member: str) -> type[Exception]:
    """A class without instances: its module, which makes those of the real one, has not been imported."""
    return type(member, (Exception,), {"__module__": module})


def _mark(module: str, member: str) -> Callable[[Any], Any]:
    """A decorator that tells the compiler something of a function and returns that function."""

    def mark(fn: Any) -> Any:
        _repeat.append(lambda: getattr(load(module), member)(fn))
        return fn

    return mark


def _nothing(module: str, member: str) -> Callable[..., None]:
    """What `graph_break` does outside compiled code, and `clear_lru_cache` before anything is remembered."""
    return lambda *_, **__: None


def _disable(module: str, member: str) -> Callable[..., Any]:
    """`torch._dynamo.disable`: nothing is compiled before the compiler is there, so nothing is kept from it before."""

    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return functools.partial(disable, recursive=recursive, **options)
        if not isinstance(fn, (types.FunctionType, types.MethodType)):
            return load(module).disable(fn, recursive, **options)
        disabled: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal disabled
            if disabled is None and is_real(module):
                disabled = load(module).disable(fn, recursive, **options)
            return (disabled or fn)(*args, **kwargs)

        return call

    return disable


def _compile_later() -> None:
    """Let `torch.compile` return a function that is compiled when it is called; it is itself again from then on.

    DeepSpeed decorates a function of an optimizer with it that few runs use.
    """
    torch = sys.modules["torch"]
    now = torch.compile

    def compile(model: Any = None, **options: Any) -> Any:
        if not isinstance(model, types.FunctionType):
            load(COMPILER)
            return now(model, **options)
        compiled: Callable[..., Any] | None = None

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                load(COMPILER)
                compiled = now(model, **options)
            return compiled(*args, **kwargs)

        return call

    torch.compile = compile
    _repeat.append(lambda: setattr(torch, "compile", now))


# Modules with the members that others take or call while they are imported, or in every step.
MEMBERS: dict[str, dict[str, Callable[[str, str], Any]]] = {
    COMPILER: {
        "allow_in_graph": _mark,
        "assume_constant_result": _mark,
        "disable": _disable,
        "graph_break": _nothing,
    },
    f"{COMPILER}.trace_rules": {"clear_lru_cache": _nothing},
    INDEX_MODE: {"TransformGetItemToIndex": _function},
    SHAPES: {
        "GuardOnDataDependentSymNode": _class,
        "expect_true": _guard,
        "guard_or_false": _guard,
        "guard_or_true": _guard,
        "guard_size_oblivious": _guard,
        "guarding_hint_or_throw": _function,
        "has_guarding_hint": _function,
        "is_nested_int": _nested,
        "statically_known_true": _guard,
        "sym_and": _joined,
        "sym_eq": _equal,
        "sym_or": _joined,
    },
    ALGEBRA: {"Basic": _class},  # torch asks of numbers on the meta device whether they are symbolic
    TRITON: {
        "_TRITON_AVAILABLE": _constant(False),
        "is_triton_available": _no,
        "tl": _constant(None),
        "triton": _constant(None),
    },
}
FAMILIES = {
    COMPILER: [name for name in MEMBERS if name.startswith(COMPILER)],
    **{name: [name] for name in (SHAPES, ALGEBRA, TRITON)},
}


def _place(name: str) -> tuple[types.ModuleType | None, str]:
    """The package of a module, if it is in one, and its name in there. The import system sets it, so that `import a.b`
    finds `b` in `a`."""
    package, _, own = name.rpartition(".")
    return (sys.modules.get(package) or importlib.import_module(package)) if package else None, own
