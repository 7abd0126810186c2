"""Full attention in 8 bits, the reference: a layer is decoded in every step, and attended to as if it had come so."""

from __future__ import annotations

from torch import Tensor

from shadowkv.common.dims import Bytes
from shadowkv.contract.layerwise import LayerState
from shadowkv.tensors import ops
from shadowkv.tensors.stored import CodedTokens


class CodedLayer(LayerState):
    """Codes of all tokens, those of a prompt and new ones alike. k and v [B,H,n,D] are not kept."""

    def __init__(self, k: Tensor, v: Tensor, coding: str) -> None:
        self._k, self._v = (CodedTokens(x, coding, offload=False) for x in (k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._k.append(k)
        self._v.append(v)
        return ops.attend(q, [(self._k.decode(), self._v.decode())], scaling)

    def nbytes(self) -> Bytes:
        return self._k.nbytes() + self._v.nbytes()
