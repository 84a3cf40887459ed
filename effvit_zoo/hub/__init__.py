"""Models as folders and on the Hub: save, load, push, pull. Importing it registers this package's models in timm."""

from .. import models as models
from .card import CardFacts as CardFacts
from .classifier import classes_of as classes_of
from .classifier import load_for_classes as load_for_classes
from .folder import FILE as FILE
from .folder import HUB as HUB
from .folder import LOCAL as LOCAL
from .folder import brings_weights as brings_weights
from .folder import load as load
from .folder import read_config as read_config
from .folder import resolve_name as resolve_name
from .folder import save as save
from .labels import class_names as class_names
from .labels import class_order as class_order
from .labels import known_names as known_names
from .labels import label_names as label_names
from .labels import match_classes as match_classes
from .publish import public as public
from .publish import pull as pull
from .publish import push as push
from .publish import require_pushable as require_pushable
from .space import push_page as push_page
