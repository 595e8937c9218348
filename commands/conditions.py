"""Evaluate conditions on columns of `obs`, such as `tissue == 'lung' and n_genes > 500`, without running code."""

import ast
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd


# A text in quotes, or a column whose name is not an identifier, in backticks.
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`")
COMPARISONS: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, values: _is_in(column, values),
    ast.NotIn: lambda column, values: ~_is_in(column, values),
}
JOINS: dict[type, Any] = {
    ast.And: operator.and_,
    ast.BitAnd: operator.and_,
    ast.Or: operator.or_,
    ast.BitOr: operator.or_,
}


def columns_of(condition: str, columns: Sequence[str]) -> list[str]:
    """Select the columns whose name occurs in a condition; a superset of the columns that it uses."""
    return [name for name in columns if name in condition]


def rows_where(obs: pd.DataFrame, condition: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Mark the rows that fulfil a condition, bool `(len(obs),)`.

    Args:
        condition: Comparisons of columns with values, or boolean columns, joined by `and`, `or` and `not`. A column
            whose name is not an identifier is written in backticks. A missing value fulfils only `!=`. Any other
            syntax is refused, so a condition cannot run code.
        names: Columns that the error lists; default: all columns of `obs`.

    Raises:
        ValueError: If the condition has other syntax, or names an unknown column.
    """
    quoted: dict[str, str] = {}

    def stand_in(match: re.Match) -> str:
        if not match.group().startswith("`"):
            return match.group()
        quoted[f"_quoted_{len(quoted)}"] = match.group()[1:-1]
        return next(reversed(quoted))

    try:
        return _rows(_value(ast.parse(QUOTED.sub(stand_in, condition).strip(), mode="eval").body, obs, quoted))
    except (SyntaxError, TypeError, ValueError, KeyError, RecursionError, MemoryError) as error:
        known = ", ".join(obs.columns if names is None else names)
        there = f"the columns are {known}" if known else "there are no columns"
        message = f"{condition!r} is not a condition on columns of obs ({error.args[0]}); {there}."
        raise ValueError(message) from None


def _value(node: ast.AST, obs: pd.DataFrame, quoted: Mapping[str, str]) -> Any:
    """Evaluate a node to a column, a value, a list of values, or a mask of rows."""
    value = functools.partial(_value, obs=obs, quoted=quoted)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [value(item) for item in node.elts]
    if isinstance(node, ast.Name):
        column = quoted.get(node.id, node.id)
        if column not in obs:
            raise KeyError(f"there is no column {column!r}")
        return obs[column]
    if isinstance(node, ast.Compare):
        sides = [value(side) for side in (node.left, *node.comparators)]
        pairs = zip(node.ops, sides[:-1], sides[1:], strict=True)
        if unknown := [by for by in node.ops if type(by) not in COMPARISONS]:
            raise TypeError(f"{type(unknown[0]).__name__.lower()} is not understood")
        return functools.reduce(operator.and_, [_rows(COMPARISONS[type(by)](*pair)) for by, *pair in pairs])
    if isinstance(node, ast.BoolOp):
        return functools.reduce(JOINS[type(node.op)], [_rows(value(part)) for part in node.values])
    if isinstance(node, ast.BinOp) and type(node.op) in JOINS:
        return JOINS[type(node.op)](_rows(value(node.left)), _rows(value(node.right)))
    if isinstance(node, ast.UnaryOp):
        operand = value(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(operand, int | float):
            return -operand
        if isinstance(node.op, ast.Not | ast.Invert):
            return ~_rows(operand)
    raise TypeError(f"{type(node).__name__.lower()} is not understood")


def _is_in(column: Any, values: Any) -> np.ndarray:
    if not isinstance(column, pd.Series) or not isinstance(values, list):
        raise TypeError("a column goes before 'in', and a list of values after it")
    return column.isin(values).to_numpy()


def _rows(part: Any) -> np.ndarray:
    """Return a part of a condition as a mask of rows; missing values of a boolean column count as false."""
    if isinstance(part, np.ndarray):
        return part
    if isinstance(part, pd.Series) and pd.api.types.is_bool_dtype(part.dtype):
        return part.astype("boolean").to_numpy(dtype=bool, na_value=False)
    raise TypeError("compare a column with a value; join comparisons by 'and', or put each in brackets")
