"""Models as folders and on the Hub: save, load, push, pull."""

from .folder import CONFIG as CONFIG
from .folder import EXTRA_KEY as EXTRA_KEY
from .folder import HUB as HUB
from .folder import LOCAL as LOCAL
from .folder import WEIGHTS_FILES as WEIGHTS_FILES
from .folder import brings_weights as brings_weights
from .folder import label_names as label_names
from .folder import load as load
from .folder import pull as pull
from .folder import push as push
from .folder import read_config as read_config
from .folder import require_pushable as require_pushable
from .folder import resolve_name as resolve_name
from .folder import save as save
