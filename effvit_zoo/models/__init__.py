"""Model families, one per file. Importing this package registers them in timm's registry."""

from . import swiftformer as swiftformer
