"""Preload libraries in the process that workers are forked from, so that all workers share their memory."""

import contextlib

from scmmgpt.commands.garbage import starting


def load() -> None:
    """Import the libraries of a worker, and load the compiled loops."""
    import numpy as np
    import pyarrow.parquet  # noqa: F401  a worker needs it to write its first partition
    import scipy.sparse as sp

    import scmmgpt.commands.partitions
    import scmmgpt.pipeline_scmmgpt  # noqa: F401
    from scmmgpt.cells_scmmgpt import Cells
    from scmmgpt.kernels_scmmgpt import WARM_UP_CELLS, kernels_pay

    with contextlib.suppress(ImportError):  # the command itself reports a missing library
        import distributed  # noqa: F401

    kernels_pay(WARM_UP_CELLS)
    Cells.from_csr(sp.csr_matrix(np.ones((1, 1), np.float32)), np.zeros(1, np.int32), sums_columns=False)


# Garbage collection among these objects would write to their memory, and so end the sharing.
with starting():
    load()
