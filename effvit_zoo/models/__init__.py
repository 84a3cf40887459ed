"""Model families, one per file. Importing this package registers them in timm's registry."""

from . import conv2former as conv2former
from . import edgenext as edgenext
from . import efficientvit as efficientvit
from . import isotropic_vit as isotropic_vit
from . import swiftformer as swiftformer
from . import swin as swin
from . import tosa_vit as tosa_vit
from ._base import STARTED_RANDOM as STARTED_RANDOM
from ._base import started as started
from ._swap import swap_attention as swap_attention
from .tosa_vit import AtRatio as AtRatio
from .tosa_vit import SelectorLosses as SelectorLosses
from .tosa_vit import to_dense as to_dense
from .tosa_vit import to_tosa as to_tosa
