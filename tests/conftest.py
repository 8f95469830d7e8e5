"""Settings of every test: no network, and no more threads than the workers leave room for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported, so it comes before them
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
