"""Which implementation of an operation serves a call, and why the others do not.

- `reference`: the specification in plain PyTorch. It serves whatever the others cannot, also where one is chosen.
- `folded`: plain PyTorch with gradients in closed form; without a GPU.
- `fused`, `split`: Triton, with one plan or the other for the linear layer.

`use_backend`, or the environment variable `HILORA_BACKEND` for a whole process, chooses one; without a choice, the
first that can and would not be slower serves. Every folder beside this file that has a reference is a family of
operations: it lists them as `OPERATIONS`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import BackendError, InvalidValueError
from .torch_internals import Scoped, exporting, in_transform

BACKENDS = ("fused", "split", "folded", "reference")  # the first that can serve does
TRITON = ("fused", "split")
_WITHOUT_A_GPU = tuple(name for name in BACKENDS if name not in TRITON)
_HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None


def _always(*call: Any) -> str:
    return ""


class Implementation(NamedTuple):
    """How a backend does an operation. All take the operation's arguments, as `Operation.prepare` gives them.

    Attributes:
        serve: does it.
        cannot: why it cannot take such a call; "" where it can.
        slower: why another is better at such a call; "" where none is. Not asked where this backend is chosen.
        because: what says so, and how it is launched; "" where there is nothing to say.
    """

    serve: Callable[..., Tensor]
    cannot: Callable[..., str] = _always
    slower: Callable[..., str] = _always
    because: Callable[..., str] = _always


class Explanation(NamedTuple):
    """Who serves a call, and why each of the others does not."""

    operation: str
    backend: str
    others: dict[str, str]
    because: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.operation}: {self.backend} serves{', ' * bool(self.because)}{self.because}",
            *(f"  not {name}: {why}" for name, why in self.others.items()),
        ]
        return "\n".join(lines)


class Operation:
    """An operation on tensors, and who does it.

    Args:
        function: what is called. Its first argument is a tensor, on the device of all.
        reference: the specification, which serves every call.
        others: other implementations, by backend.
        prepare: from the arguments of `function`, all by position, to those of the implementations; refuses wrong ones.
        dtype: what a kernel would compute in, given these arguments; of the first argument by default.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        others: Mapping[str, Implementation],
        prepare: Callable[..., tuple[Any, ...]] = lambda *call: call,
        dtype: Callable[..., torch.dtype] = lambda x, *rest: x.dtype,
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.prepare = prepare
        self.dtype = dtype
        self.implementations = {**others, "reference": Implementation(reference)}

    def __call__(self, *arguments: Any) -> Tensor:
        call = self.prepare(*arguments)
        return self.implementations[self._backend(call)].serve(*call)

    def _backend(self, call: tuple[Any, ...]) -> str:
        chosen = chosen_backend()
        likely = _WITHOUT_A_GPU if call[0].is_cpu else BACKENDS
        for name in likely if chosen is None else (chosen,):
            if not self._why_not(name, call, chosen):
                return name
        return "reference"

    def _why_not(self, name: str, call: tuple[Any, ...], chosen: str | None) -> str:
        """Why a backend does not serve a call; "" if it can and no other is known to be better.

        Raises:
            BackendError: if a kernel is chosen that cannot run here.
        """
        if name not in self.implementations:
            return "there is no such implementation"
        if name != "reference" and (_TWICE.get() or in_transform()):
            return "gradients of gradients, and torch.func, are the reference's"
        if name != "reference" and exporting():
            return "exported programs, which may see any batch on any machine, are the reference's"
        implementation = self.implementations[name]
        why = implementation.cannot(*call)
        if not why and name in TRITON:
            why = _kernels_cannot(call[0], self.dtype(*call), chosen)
        return why if why or name == chosen else implementation.slower(*call)

    def explain(self, *arguments: Any) -> Explanation:
        call = self.prepare(*arguments)
        chosen, serves = chosen_backend(), self._backend(call)
        others: dict[str, str] = {}
        for name in BACKENDS:
            if name != serves:
                other_is_chosen = chosen is not None and name != chosen
                why = f"{chosen} is chosen" if other_is_chosen else self._why_not(name, call, chosen)
                others[name] = why or f"{serves} is preferred"
        return Explanation(self.name, serves, others, self.implementations[serves].because(*call))


def _kernels_cannot(x: Tensor, dtype: torch.dtype, chosen: str | None) -> str:
    """Why the kernels do not take a tensor: on a GPU from Ampere on; on a CPU where chosen, in Triton's interpreter."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"kernels do not compute in {dtype}"
    if not _HAS_TRITON:
        why = "triton is not installed"
    elif x.device.type != "cuda":
        interpreted = chosen is not None and os.environ.get("TRITON_INTERPRET") == "1"
        why = "" if interpreted else f"got a tensor on {x.device}"
    else:
        why = "" if torch.cuda.get_device_capability(x.device)[0] >= 8 else "the GPU is older than Ampere"
    if why and chosen is not None:
        raise BackendError(
            f"{chosen} was chosen, by use_backend or HILORA_BACKEND, but {why}: it needs triton and CUDA tensors of a "
            "GPU from Ampere on, or TRITON_INTERPRET=1"
        )
    return why


def _known(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise InvalidValueError(f"{where}{name!r}: expected one of {', '.join(BACKENDS)}, or nothing")
    return name


_CHOSEN = Scoped("backend", _known(os.environ.get("HILORA_BACKEND") or None, "HILORA_BACKEND="))
_TWICE = Scoped("twice_differentiable", False)


def chosen_backend() -> str | None:
    """The backend that `use_backend` or `HILORA_BACKEND` chose, if any."""
    return _CHOSEN.get()


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Inside of this, in the same thread and task, a backend of one's choice serves: `with use_backend("reference"):`.

    What it cannot do, the reference does. For backward passes what counts is who served forward.

    Args:
        name: `reference`, `folded`, `fused` or `split`; None for no choice, whatever `HILORA_BACKEND` says.

    Raises:
        InvalidValueError: for another name.
        BackendError: from a call, if a kernel is chosen that cannot run there.
    """
    return _CHOSEN.set(_known(name, "use_backend: there is no "))


def twice_differentiable() -> AbstractContextManager[None]:
    """Inside of this, gradients can be differentiated once more: the reference serves."""
    return _TWICE.set(True)


def folders() -> list[str]:
    """The families of operations, as modules: every folder beside this file that has a reference."""
    paths = import_module(__package__).__path__
    found = [Path(path, module.name) for path in paths for module in iter_modules([path])]
    return [f"{__package__}.{folder.name}" for folder in found if (folder / "reference.py").exists()]


def operations() -> dict[str, Operation]:
    """All operations by name."""
    return {one.name: one for folder in folders() for one in import_module(folder).OPERATIONS}


def explain(operation: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Who would serve a call, and why each of the others does not: `print(explain(gram_penalty, active, [B], [0.1]))`.

    Args:
        operation: of `hilora.kernels`, e.g. `stacked_lora_linear`.
        args: as for the call, which is not made.
        kwargs: likewise.

    Raises:
        InvalidValueError: for anything but an operation, or for arguments that the call would refuse.
        BackendError: if a kernel is chosen that cannot run there.
    """
    known = operations()
    found = known.get(getattr(operation, "__name__", ""))
    if found is None or found.function is not operation:
        raise InvalidValueError(f"{operation!r} is not an operation: expected one of {', '.join(known)}")
    bound = inspect.signature(operation).bind(*args, **kwargs)
    bound.apply_defaults()
    return found.explain(*bound.args)
