"""Where there is a GPU nothing is pretended, and torch's library has another name where it is not Linux."""

import sys

import torch

collect_ignore = [] if sys.platform == "linux" and not torch.cuda.is_available() else ["test_technique.py"]
