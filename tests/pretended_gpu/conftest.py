"""Where there is a GPU nothing is pretended, and torch's library has another name where it is not Linux."""

import sys

import torch

if sys.platform != "linux" or torch.cuda.is_available():
    collect_ignore_glob = ["test_[!f]*.py"]  # all but FAISS
