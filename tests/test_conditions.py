"""Conditions on columns of `obs`: which rows fulfil them, and that they run nothing."""

import numpy as np
import pandas as pd
import pytest

from scmmgpt.commands.conditions import rows_where


OBS = pd.DataFrame(
    {
        "tissue": pd.Categorical(["lung", "blood", "lung", "liver"]),
        "n genes": [100, 900, 900, 500],
        "leiden": pd.Categorical(["0", "1", "10", "1"]),
        "is_control": [False, True, True, False],
        "donor": pd.array([1, None, 2, 3], dtype="Int64"),
        "doublet": pd.array([True, None, False, True], dtype="boolean"),
    },
    index=["a", "a", "b", "c"],  # names may be there twice
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("tissue == 'lung'", [0, 2]),
        ("tissue == 'lung' and `n genes` > 500", [2]),
        ("not (tissue in ['lung', 'liver']) or leiden == '10'", [1, 2]),
        ("leiden in ['1', 1.0]", [1, 3]),
        ("`n genes` in ['900', 900.0]", [1, 2]),
        ("100 <= `n genes` < 900 and tissue != 'liver'", [0]),
        ("(tissue == 'lung') & ~(leiden == '0')", [2]),
        ("is_control", [1, 2]),
        ("doublet and donor > 0", [0, 3]),
        ("donor in [2, 3] or tissue == 'blood'", [1, 2, 3]),
        ("is_control and `n genes` > -1", [1, 2]),
        ("tissue == '`lung`' or leiden not in ('0', '1')", [2]),
    ],
)
def test_a_condition_selects_its_rows(condition, rows):
    assert np.flatnonzero(rows_where(OBS, condition)).tolist() == rows


@pytest.mark.parametrize(
    "condition",
    [
        "tissue.str.len() > 2",
        "leiden == '`' or @pd.io.common.os.getcwd() == '' or leiden == '`'",
        "leiden == 'a' or tissue.str.len() == 4 or `n genes` == 1",
        "tissue == 'lung' & `n genes` > 500",
        "1 == 1",
        "'lung' in tissue",
        "f'{tissue}' == 'lung'",
        "(lambda: 1)() == 1",
        "[x for x in tissue] == 1",
        "tissue",
        "tissue is 'lung'",
        "tissue == -'lung'",
        "@OBS.shape[0] == 4",
        "tissue.__class__ == 1",
        "__import__('os').getcwd() == ''",
        "`tissue`.astype('str') == 'lung'",
        "organ == 'lung'",
        "tissue = 'lung'",
        "tissue ==",
        "",
    ],
)
def test_what_is_no_condition_is_refused_with_the_columns(condition):
    with pytest.raises(ValueError, match="is not a condition on columns of obs.*tissue, n genes, leiden"):
        rows_where(OBS, condition)
