import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the programs are flat files beside this folder
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # attention.py's kernels run in numpy, if Triton is installed
