"""scMMGPT: one language model for single cells and text."""

from importlib import import_module
from typing import Any


# Public name -> module. Modules are loaded on first use, so that `import scmmgpt` and `scmmgpt --help` are fast.
_MODULES = {
    "Cells": "cells_scmmgpt",
    "GeneIndex": "genes_scmmgpt",
    "ScGPTConfig": "configuration_scmmgpt",
    "ScGPTForPreTraining": "modeling_scgpt",
    "ScGPTForSequenceClassification": "modeling_scgpt",
    "ScGPTModel": "modeling_scgpt",
    "ScGPTProcessor": "processing_scmmgpt",
    "ScMMGPTCellEncoder": "modeling_scmmgpt",
    "ScMMGPTConfig": "configuration_scmmgpt",
    "ScMMGPTDataCollator": "collator_scmmgpt",
    "ScMMGPTFeatureExtractor": "feature_extraction_scmmgpt",
    "ScMMGPTForCellTextAlignment": "modeling_scmmgpt",
    "ScMMGPTForConditionalGeneration": "modeling_scmmgpt",
    "ScMMGPTModel": "modeling_scmmgpt",
    "ScMMGPTPipeline": "pipeline_scmmgpt",
    "ScMMGPTProcessor": "processing_scmmgpt",
    "inspect_matrix": "matrices_scmmgpt",
    "read_cells": "reading_scmmgpt",
    "read_file": "readers.cell_files",
}
_TOOLS = ("tl", "pl")  # modules: `import scmmgpt as sm; sm.tl.annotate(adata)`

__all__ = sorted([*_MODULES, *_TOOLS, "read"])
__version__: str  # of the installed package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("scmmgpt")
        except PackageNotFoundError:  # a clone that is not installed
            return "0+unknown"
    if name in _TOOLS:
        return import_module(f"{__name__}.{name}")
    if name == "read":  # the name in scverse
        return __getattr__("read_file")
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
