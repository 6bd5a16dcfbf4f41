"""Code that works on tensors in -> the bytes that it holds in each of its moments, none made.

Under torch's FakeTensorMode tensors have a device, a type and a size, and no values. A mode over it
adds up their storages as they come and go, each under the label of what was being done.
Index tensors (token ids, places, versions) stay real: what is read of them decides sizes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sizes = dict[str, float]
"""Bytes held under each label."""

GATHERED = "gathered weights"
"""The label of what FSDP2 gathers: the storages that it empties and fills again."""


class SizeTracker(TorchDispatchMode):
    """Adds up fake tensors' storages while it is entered; FakeTensorMode is entered with it.

    fullest: for each label, what was held when most was held while it was the current one.
    elsewhere: labels whose bytes are counted and not added to what fills the device.
    """

    def __init__(self, elsewhere: Set[str] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = ""
        self.fullest: dict[str, Sizes] = {}
        self._elsewhere = elsewhere
        self._held = Counter[str]()
        self._most = Counter[str]()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        # FSDP2 empties storages past the dispatcher: torch's own MemTracker listens here as well.
        torch.UntypedStorage.resize_ = self._listen_to_resize()  # type: ignore[method-assign,assignment]
        self._fake.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._fake.__exit__(*raised)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made within is held under this label."""
        before, self.label = self.label, label
        yield
        self.label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Hold a tensor's storage under another label from now on."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = local.untyped_storage()._cdata
        if key in self._storages:
            reference, size, _ = self._storages[key]
            self._forget(key)
            self._hold(key, reference, size, label)

    def forget_peaks(self) -> None:
        """Begin anew with what is held now."""
        self.fullest, self._most = {}, Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again as what it does to this rank's part
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) or each.is_meta for each in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a loss, a norm: no size follows from them
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_as_places(index) for index in args[1]])
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            gone = weakref.ref(storage, lambda _: self._forget(key))
            self._hold(key, gone, storage.nbytes(), self.label)

    def _hold(self, key: int, reference: weakref.ref[Any], size: int, label: str) -> None:
        self._storages[key] = (reference, size, label)
        self._held[label] += size
        here = sum(size for name, size in self._held.items() if name not in self._elsewhere)
        if here > self._most[self.label]:
            self._most[self.label] = here
            self.fullest[self.label] = dict(self._held)

    def _forget(self, key: int) -> None:
        _, size, label = self._storages.pop(key)
        self._held[label] -= size

    def _listen_to_resize(self) -> Callable[[torch.UntypedStorage, int], None]:
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            key = storage._cdata
            if key in self._storages:
                reference = self._storages[key][0]
                self._forget(key)
                self._hold(key, reference, storage.nbytes(), GATHERED)

        return resize


def _as_places(index: Tensor | None) -> Tensor | None:
    """A mask as the places where it is true: how many they are must be known."""
    if index is None or index.dtype is not torch.bool:
        return index
    if isinstance(index, FakeTensor):
        return index.new_empty(index.numel(), dtype=torch.int64)  # a mask of values: at most all
    with unset_fake_temporarily():
        return index.nonzero().squeeze(1)
