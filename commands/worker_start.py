"""Import this in the process that workers are copies of: what each would load for its first cells is then shared."""

import contextlib

from scmmgpt.commands.garbage import starting


def load() -> None:
    """Import the libraries of a worker, and load the compiled loops."""
    import numpy as np
    import pyarrow.parquet  # noqa: F401  imported when the first partition is written
    import scipy.sparse as sp

    import scmmgpt.commands.partitions
    import scmmgpt.pipeline_scmmgpt  # noqa: F401
    from scmmgpt.cells_scmmgpt import Cells
    from scmmgpt.kernels_scmmgpt import WARM_UP_CELLS, kernels_pay

    with contextlib.suppress(ImportError):  # the command says what is missing
        import distributed  # noqa: F401

    kernels_pay(WARM_UP_CELLS)
    Cells.from_csr(sp.csr_matrix(np.ones((1, 1), np.float32)), np.zeros(1, np.int32), sums_columns=False)


# A later search among these objects would write to their memory, which is shared until then.
with starting():
    load()
