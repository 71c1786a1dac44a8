"""``python -m pyroelbo``: the command line."""

import sys

from pyroelbo.cli import main

sys.exit(main())
