"""``python -m lightning_qat.cli``."""

import sys

from lightning_qat.cli import main

sys.exit(main())
