"""Import this in the process that workers are copies of: what each would load for its first cells is then shared."""

import gc

import numpy as np
import pyarrow.parquet  # noqa: F401  imported when the first partition is written
import scipy.sparse as sp

import scmmgpt.commands.partitions
import scmmgpt.pipeline_scmmgpt  # noqa: F401
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.kernels_scmmgpt import WARM_UP_CELLS, kernels_pay


kernels_pay(WARM_UP_CELLS)
Cells.from_csr(sp.csr_matrix(np.ones((1, 1), np.float32)), np.zeros(1, np.int32), sums_columns=False)
gc.freeze()  # else a look for garbage writes to the memory of all objects, which is shared until then
