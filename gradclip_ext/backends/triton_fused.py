"""Whole calls by the triton backend, where a compiled module is there to read and check their lists.

Any build of it will do, one without CUDA, too. What is unusual is left to the general path, which asks
every tensor from Python and ends at the same kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradclip_ext import _core, checks
from gradclip_ext.backends.foreach import clip_coef
from gradclip_ext.backends.triton import CompileError, TritonBackend
from gradclip_ext.backends.triton_table import GatheredList, norm_dtype


class FusedTriton:
    """The calls of :class:`_core.FusedCalls`, by Triton kernels.

    Args:
        backend: launches the kernels.
        serves: tells whether the backend is the one for a device.
        cuda_only: the backend is for CUDA and ROCm devices, so that lists of others need not be read.
    """

    def __init__(
        self, backend: TritonBackend, serves: Callable[[torch.device], bool], *, cuda_only: bool
    ) -> None:
        self._backend = backend
        self._serves = serves
        self._cuda_only = cuda_only

    def clip_grad_norm_(
        self, parameters: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, /
    ) -> tuple[Tensor, bool] | None:
        # To refuse a norm, the host has to wait for it in between; nothing is gained here then.
        if error_if_nonfinite or not norm_type > 0.0:
            return None
        listing = self._gather(parameters, parameters=True, write=True)
        if listing is None:
            return None
        norm = self._backend.clip_listed_(listing, max_norm, norm_type)
        return None if norm is None else (norm, False)

    def get_total_norm(self, tensors: list[Tensor], norm_type: float, /) -> Tensor | None:
        listing = self._gather(tensors, parameters=False, write=False) if norm_type > 0.0 else None
        if listing is None:
            return None
        try:
            return self._backend.total_norm(listing, norm_type, norm_dtype(listing))[0]
        except CompileError:
            return None

    def clip_grads_with_norm_(self, parameters: list[Tensor], max_norm: float, norm: Tensor, /) -> bool:
        listing = self._gather(parameters, parameters=True, write=True) if type(norm) is Tensor else None
        if listing is None or norm.device != listing.device:
            return False
        if math.isinf(max_norm):
            listing.bump_versions()
            return True
        try:
            with torch.no_grad():
                coef = clip_coef(norm, max_norm)
            self._backend.scale_listed_(listing, coef)
        except CompileError:
            return False
        return True

    def clamp_grad_(self, parameters: list[Tensor], min: float, max: float, /) -> bool:
        listing = self._gather(parameters, parameters=True, write=True)
        if listing is None:
            return False
        checks.representable(listing.dtypes, min, max)
        try:
            self._backend.clamp_listed_(listing, min, max)
        except CompileError:
            return False
        return True

    def _gather(self, listed: list[Tensor], *, parameters: bool, write: bool) -> GatheredList | None:
        assert _core.C is not None
        gathered = _core.C.gather(listed, parameters, write, self._cuda_only)
        return GatheredList(gathered) if gathered is not None and self._serves(gathered.device) else None
