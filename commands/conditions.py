"""Conditions on columns of `obs`, such as `tissue == 'lung' and n_genes > 500`, that compute and call nothing else."""

import ast
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd


QUOTED = re.compile(r"`[^`]*`")  # a column whose name is no identifier
PARTS = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
    *(ast.BinOp, ast.BitAnd, ast.BitOr, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)


def columns_of(condition: str, columns: Sequence[str]) -> list[str]:
    """Those of the columns that a condition may name."""
    return [name for name in columns if name in condition]


def rows_where(obs: pd.DataFrame, condition: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Which rows fulfil a condition, bool `(len(obs),)`.

    Args:
        condition: Comparisons of columns with values, joined by `and`, `or` and `not`, as `DataFrame.query` reads
            them; a column whose name is no identifier stands in backticks. An attribute, a call or a variable of
            Python is refused, since `query` would run it.
        names: Columns to name in the error; by default those of `obs`.

    Raises:
        ValueError: If it is no such condition, or names another column.
    """
    try:
        for node in ast.walk(ast.parse(QUOTED.sub("_", condition).strip(), mode="eval")):
            if not isinstance(node, PARTS):
                raise TypeError(f"{type(node).__name__.lower()} is not allowed")
        numbered = obs[columns_of(condition, list(obs.columns))].assign(_row=np.arange(len(obs)))
        rows = numbered.query(condition, engine="python")["_row"]
    except Exception as error:  # pandas raises many types for what it cannot compare
        why, known = " ".join(str(error).split())[:200], ", ".join(map(str, obs.columns if names is None else names))
        raise ValueError(
            f"{condition!r} is no condition on columns of obs ({why}); the columns are {known}."
        ) from None
    mask = np.zeros(len(obs), dtype=bool)
    mask[rows] = True
    return mask
