"""Attention mechanisms, one per file: pure functions and thin modules. `TOKEN_MIXERS` lists those that drop into an isotropic ViT."""

from typing import Dict, Type

from ._mixer import GridMixer, MixerShape, TokenMixer
from .additive import EfficientAdditiveMixer
from .conv_modulation import ConvModulationMixer
from .cosformer import Cosformer2dAttention, CosformerAttention, cosformer_attention, cosformer_attention_2d
from .cross_covariance import CrossCovarianceMixer
from .elu_linear import EluLinearAttention, elu_linear_attention
from .hydra import HydraAttention, hydra_attention
from .multiscale_linear import MultiScaleLinearMixer
from .sima import SimaAttention, SimaClassAttention, sima_attention, sima_class_attention
from .softmax import SoftmaxAttention, softmax_attention

__all__ = [
    "TOKEN_MIXERS",
    "ConvModulationMixer",
    "Cosformer2dAttention",
    "CosformerAttention",
    "CrossCovarianceMixer",
    "EfficientAdditiveMixer",
    "EluLinearAttention",
    "GridMixer",
    "HydraAttention",
    "MixerShape",
    "MultiScaleLinearMixer",
    "SimaAttention",
    "SimaClassAttention",
    "SoftmaxAttention",
    "TokenMixer",
    "cosformer_attention",
    "cosformer_attention_2d",
    "elu_linear_attention",
    "hydra_attention",
    "sima_attention",
    "sima_class_attention",
    "softmax_attention",
]

TOKEN_MIXERS: Dict[str, Type[TokenMixer]] = {
    "softmax": SoftmaxAttention,
    "elu": EluLinearAttention,
    "cosformer": CosformerAttention,
    "cosformer_2d": Cosformer2dAttention,
    "hydra": HydraAttention,
    "sima": SimaAttention,
    "xca": CrossCovarianceMixer,
    "additive": EfficientAdditiveMixer,
    "multiscale_linear": MultiScaleLinearMixer,
    "conv_mod": ConvModulationMixer,
}
"""Name -> mixer. A new mechanism is one file and one row here."""
