"""A device that is pretended: its tensors are real ones in host memory behind another name, and every operation on them is watched.

What a GPU would refuse is refused (a tensor of the host among those of the device), and what makes the host wait for a GPU is noted with
the line that asked for it: reading a number, a copy back, a copy there that is not asynchronous, a result whose size depends on data.

PyTorch has room for one device of this kind in a process and can't be rid of it again, so it is for processes of their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
TORCH = str(Path(torch.__file__).parent)

DATA_DEPENDENT = {
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten.equal,
    aten._local_scalar_dense,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None: ...


# At import, as the autograd engine counts the kinds of devices at its first use.
_setup_privateuseone_for_python_backend(NAME, _Module())


class There(torch.Tensor):
    """A tensor of the pretended device. held: what it holds."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> There:
        device = torch.device(NAME, 0)
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=device
        )

    def __init__(self, real: torch.Tensor) -> None:
        self.held = real

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        """PyTorch has none for tensors of a subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the pretended device outside of `Pretended`")


class _Made(TorchFunctionMode):
    """`torch.tensor` and its like make a tensor in the host's memory and copy it, below what `Pretended` sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(asked or args[0].device)
        if func in (torch.tensor, torch.as_tensor) and asked is not None and torch.device(asked).type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(asked)
        return func(*args, **kwargs)


class Pretended(TorchDispatchMode):
    """Inside this block there is such a device. waits: the operations that a GPU's host would have waited for,
    and the functions that asked, the outermost first; none where the backward pass did."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.waits, self.operations = torch.device(NAME, 0), list[dict[str, Any]](), 0
        self._made = _Made()

    def __enter__(self) -> Self:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, There) for x in given)
        asked, packet = kwargs.get("device"), func.overloadpacket
        to = torch.device(asked).type if asked is not None else None
        if not there and to != NAME:
            return func(*args, **kwargs)
        self.operations += there
        self._watch(packet, func, args, kwargs, given, there, to)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        if packet is aten._to_copy:
            kwargs["non_blocking"] = False
        wrapped = {id(x.held): x for x in given if isinstance(x, There)}
        real_args, real_kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        if to == "cpu" or (packet is aten.copy_ and not isinstance(args[0], There)):
            return out
        out = tree_map(lambda x: wrapped[id(x)] if id(x) in wrapped else There(x) if isinstance(x, torch.Tensor) else x, out)
        # A view has to know whose: autograd adds in place to a gradient that nobody else holds.
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out

    def _watch(
        self, packet: Any, func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[torch.Tensor], there: bool, to: str | None
    ) -> None:
        strangers = [x for x in given if not isinstance(x, There) and x.dim()]
        why = ""
        if packet in DATA_DEPENDENT or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            why = "its result depends on data"
        elif packet in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None):
            why = "a mask as an index is counted first"
        elif packet in INDEXING and strangers:
            why = "an index of the host is copied"
        elif packet in COPIES and to == "cpu":
            why = "copied to the host"
        elif packet in COPIES and strangers and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            why = "copied to the device, and not asynchronously"
        elif strangers and packet not in COPIES:
            raise RuntimeError(f"{func}: tensors on {NAME} and on cpu, {[(type(x).__name__, tuple(x.shape)) for x in given]}")
        if why:
            frames = [f for f in traceback.extract_stack() if not f.filename.startswith((TORCH, __file__))]
            self.waits.append({"what": str(packet), "why": why, "asked": [f.name for f in frames]})
