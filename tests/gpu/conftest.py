"""Tests that need an NVIDIA GPU; all are skipped where there is none.  pytest -s tests/gpu"""
import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
