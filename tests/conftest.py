import os

import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is decorated, so it must be set before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1"
