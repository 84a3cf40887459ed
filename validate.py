#!/usr/bin/env python
"""`effzoo validate` from a checkout: `python validate.py --model runs/quickstart/best --data builtin:fashion-mnist-mini`."""

import sys

from effvit_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
