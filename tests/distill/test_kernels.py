"""The Triton kernels on a CPU, in Triton's interpreter, against the same laws as the plain path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(files: list[str], chosen: str) -> None:
    """Run tests of this folder in a process of their own: Triton reads the variable when a kernel is defined."""
    names = [str(HERE / name) for name in files]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names, "-k", chosen],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout


@needs_triton
@pytest.mark.slow
def test_the_kernels_give_the_dense_definition_of_every_divergence() -> None:
    interpreted(["test_losses.py"], "every_loss and ([1- and 1.0] or [3- and 0.5]) or statistics")


@needs_triton
@pytest.mark.slow
def test_the_kernels_serve_sparse_targets_padding_and_empty_batches() -> None:
    chosen = "triton_is_used or padding_rows or whatever_t_sums_to or low_precision or without_labels or determine"
    interpreted(["test_sparse.py", "test_fused.py"], chosen)
