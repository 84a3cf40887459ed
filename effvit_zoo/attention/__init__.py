"""Attention mechanisms, one per file: pure functions and thin modules. `TOKEN_MIXERS` names those that drop into an isotropic ViT."""

from typing import Dict, Type

from ._mixer import TokenMixer
from .softmax import SoftmaxAttention

TOKEN_MIXERS: Dict[str, Type[TokenMixer]] = {
    "softmax": SoftmaxAttention,
}
