import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "strategies"))  # its short distillation, under every strategy
