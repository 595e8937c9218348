"""One self-contained HTML page about the results of a file: map, labels, evidence, descriptions, warnings, receipt.

The page needs no network and no file beside it. Needs the extra `eval`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.audit_scmmgpt import CONTRADICTED
from scmmgpt.commands.inspect_input import KIND_WORDS
from scmmgpt.commands.verify import COMMANDS, receipts
from scmmgpt.expression_scmmgpt import share
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.receipt_scmmgpt import superseded
from scmmgpt.records_scmmgpt import in_few_lines, need_columns, recorded


SHOWN = 10  # rows of a table of cells
SILENT = 0.1  # a marker that fewer cells of a label express is missing
WORST = 3  # given labels that a warning names
LOW_MATCH, LOW_SCORE = 0.6, 0.5  # shares and scores below these get a warning
KEY = "scmmgpt"
DESCRIBED = 10_000  # cells at most, which are in memory at once


def describe_some(pipeline: Any, adata: Any, cluster_key: str | None, seed: int = 0, **read_kwargs: Any) -> None:
    """Describe annotated cells with proof; of more than `DESCRIBED` so many that are drawn, the others as ""."""
    if adata.n_obs <= DESCRIBED:
        pipeline.describe(adata, proof=True, cluster_key=cluster_key, **read_kwargs)
        return
    rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:DESCRIBED])
    some = adata[rows].copy()
    pipeline.describe(some, proof=True, cluster_key=cluster_key, **read_kwargs)
    texts = np.full(adata.n_obs, "", dtype=object)
    texts[rows] = some.obs[f"{KEY}_description"]
    adata.obs[f"{KEY}_description"] = texts.astype(str)
    adata.uns[KEY] = {**adata.uns[KEY], "describe": some.uns[KEY]["describe"]}


def report_page(adata: Any, title: str, label_key: str | None = None, seed: int = 0) -> str:
    """The page about annotated cells, as HTML.

    Args:
        adata: AnnData with the results of `annotate`; those of `explain`, `audit` and `describe` are shown, too.
        title: Heading of the page.
        label_key: Column of `obs` with given labels, to compare.
        seed: Seed of the map.

    Raises:
        ValueError: If the cells are not annotated, or there is no column `label_key`.
    """
    from scmmgpt.commands.pages import render_page

    if f"{KEY}_cell_type" not in adata.obs:
        raise ValueError("The cells have no labels of `scmmgpt annotate`: annotate them first, or name a --model.")
    need_columns(adata.obs, *filter(None, [label_key]))
    return render_page(
        "cells.html",
        title=title,
        percent=lambda value: "–" if value is None else share(value),
        n_cells=adata.n_obs,
        pictures=pictures(adata, label_key, seed),
        warnings=warnings_of(adata),
        labels=label_rows(adata),
        evidence=evidence_rows(recorded(adata, KEY, "explain")),
        clusters=cluster_rows(adata),
        audit=audit_rows(adata),
        descriptions=description_rows(adata),
        groups=group_rows(recorded(adata, KEY, "describe")),
        n_described=int((adata.obs.get(f"{KEY}_description", pd.Series()).astype(str) != "").sum()),
        input=input_facts(recorded(adata, KEY, "input")),
        receipts=[{"verb": verb, "facts": receipt_facts(receipt)} for _, verb, receipt in receipts(adata.uns)],
    )


def pictures(adata: Any, label_key: str | None, seed: int) -> dict[str, dict[str, str]]:
    """Name -> `src`, `alt` and `caption` of each picture; fewer than five cells have no map."""
    from scmmgpt import pl
    from scmmgpt.eval import figures

    found: dict[str, tuple[Any, str]] = {}
    if adata.n_obs >= 5:
        places, rows, what = pl.coordinates(adata, seed)
        for name in ("cell_type", "score"):
            title, values = name.replace("_", " "), adata.obs[f"{KEY}_{name}"].iloc[rows].to_numpy()
            caption = f"{what}: {len(rows):,} cells by {title}."
            found[f"map of {title}"] = figures.scatter_figure(places, {title: values}), caption
    if "gene" in recorded(adata, KEY, "explain"):
        caption = (
            "Genes that speak for each label against the runner-up. A bar is the part of the gene in the log odds "
            "(natural logarithm) of the label, in the mean of its cells. Darker: more of them express the gene."
        )
        found["evidence"] = pl.evidence(adata), caption
    if label_key is not None:
        caption = f"Labels of {label_key} in rows, predicted labels in columns."
        found["confusion"] = pl.confusion(adata, label_key), caption
    return {
        name: {"src": figures.data_uri(figure), "alt": caption, "caption": caption}
        for name, (figure, caption) in found.items()
    }


def warnings_of(adata: Any) -> list[str]:
    """Warnings to read before the labels, as sentences."""
    done, read = recorded(adata, KEY, "annotate"), recorded(adata, KEY, "input")
    found = [str(text) for text in np.atleast_1d(read.get("warnings", []))]
    genes = read.get("genes", {})
    if (matched := genes.get("share_matched", 1.0)) < LOW_MATCH:
        counted = genes.get("share_expression_matched")
        has = "" if counted is None else f", with {share(counted)} of the expression"
        found.append(f"Only {share(matched)} of the genes of the file are genes of the checkpoint{has}.")
    if bool(done.get("collapsed", False)):
        found.append("Nearly all cells have one label. Check the matrix and the candidate labels.")
    if f"{KEY}_novelty" in adata.obs:
        found += novelty_warnings(adata.obs)
    if f"{KEY}_audit" in adata.obs:
        found += audit_warnings(adata.obs, str(recorded(adata, KEY, "audit").get("label_key", "")))
    weak = [str(label) for label in np.atleast_1d(done.get("weak_labels", []))]
    found += [f"The file lacks genes that tell {label!r} from another label." for label in weak]
    low = int((adata.obs[f"{KEY}_score"] < LOW_SCORE).sum())
    if low:
        found.append(f"With a score below {LOW_SCORE}: {low:,} of {adata.n_obs:,} cells.")
    if f"{KEY}_cell_type_majority" in adata.obs and "clusters" not in done:
        found.append("The file has no votes of clusters, which older versions did not keep: annotate it again.")
    for verb in superseded(adata, KEY):
        what = {"explain": "The evidence is", "describe": "The descriptions are"}[verb]
        found.append(f"{what} of other labels than those of this page: run scmmgpt {COMMANDS[verb]} again.")
    if not recorded(adata, KEY, "explain"):
        found.append("There is no evidence for the labels: run scmmgpt annotate with --evidence.")
    return in_few_lines(found)


def novelty_warnings(obs: pd.DataFrame) -> list[str]:
    """How many cells are like no label of the checkpoint, by what they are called."""
    novel = obs[f"{KEY}_cell_type"].astype(str)[obs[f"{KEY}_novelty"] > 1]
    unknown, found = int((novel == UNKNOWN).sum()), []
    if unknown:
        found.append(f"Resembling no type of the checkpoint: {unknown:,} of {len(obs):,} cells, called {UNKNOWN}.")
    if named := len(novel) - unknown:
        how = "named by a broader type or a reference profile"
        found.append(f"Unlike the cells of every label: {named:,} of {len(obs):,} cells, {how}.")
    return found


def audit_warnings(obs: pd.DataFrame, label_key: str) -> list[str]:
    """How many given labels the audit contradicts, and those of which it contradicts the largest shares."""
    bad = obs[f"{KEY}_audit"] == CONTRADICTED
    if not bad.any():
        return []
    count = f"The audit contradicts {bad.sum():,} of {len(obs):,} given labels"
    if label_key not in obs:
        return [f"{count}."]
    given = obs[label_key].astype(str)
    of_label = bad.groupby(given).agg(["sum", "count"]).query("sum > 0")
    of_label["share"] = of_label["sum"] / of_label["count"]
    worst = []
    for label, row in of_label.sort_values(["share", "sum"], ascending=False, kind="stable").head(WORST).iterrows():
        other = obs.loc[bad & (given == label), f"{KEY}_audit_suggested"].astype(str).value_counts().index[0]
        worst.append(f"{label} ({row['sum']:,.0f} of {row['count']:,.0f} cells, {other} suggested)")
    return [f"{count} of {label_key}, the largest share of {', '.join(worst)}."]


def label_rows(adata: Any) -> list[dict[str, Any]]:
    """A row for each label, the commonest first."""
    obs, rows = adata.obs, []
    for name, mine in obs.groupby(f"{KEY}_cell_type", observed=True):
        columns = {
            column: mine[f"{KEY}_{column}"] for column in ("score", "marker_support") if f"{KEY}_{column}" in obs
        }
        means = {column: float(values.mean()) if values.notna().any() else None for column, values in columns.items()}
        ids = mine[f"{KEY}_cl_id"].astype(str).unique() if f"{KEY}_cl_id" in obs else [""]
        about = {"label": str(name), "cl_id": str(ids[0]), "cells": len(mine), "share": len(mine) / len(obs)}
        sets = mine[f"{KEY}_label_set"].astype(str) if f"{KEY}_label_set" in obs else None
        size = None if sets is None else float(sets.str.count(r" \| ").add(1).mean())
        about |= {"set_size": size, "set": "" if sets is None else sets.value_counts().index[0].replace(" | ", ", ")}
        score = None if name == UNKNOWN else means["score"]  # that of a label which the cell was not given
        rows.append({**about, "score": score, "support": means.get("marker_support")})
    return sorted(rows, key=lambda row: -row["cells"])


def evidence_rows(explained: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each label: runner-up, genes, markers that it expresses and that it lacks."""
    if "gene" not in explained:
        return []
    columns = ("name", "cells", "rival", "gene", "term", "expressing", "elsewhere", "marker")
    table = pd.DataFrame({name: np.asarray(explained[name]) for name in columns})
    rows = []
    are_others = table.name.nunique() > 1  # a share of no cells is no 0 %
    for name, mine in table.groupby("name", sort=False):
        genes = (
            mine[(mine.term > 0) & (mine.expressing > 0)]
            .sort_values("term", ascending=False, kind="stable")
            .head(SHOWN)
        )
        markers = mine[mine.marker.astype(bool)]
        rows.append(
            {
                "label": str(name),
                "rival": str(mine.rival.iloc[0]),
                "genes": [
                    {
                        "gene": g.gene,
                        "expressing": float(g.expressing),
                        "elsewhere": float(g.elsewhere) if are_others else None,
                    }
                    for g in genes.itertuples()
                ],
                "markers": markers[markers.expressing >= SILENT].gene.tolist(),
                "missing": markers[markers.expressing < SILENT].gene.tolist(),
                "cells": int(mine.cells.iloc[0]),
            }
        )
    return sorted(rows, key=lambda row: -row["cells"])


def cluster_rows(adata: Any) -> list[dict[str, Any]]:
    """A row for each cluster that `annotate` was given: its type, and the votes of its cells."""
    table = recorded(adata, KEY, "annotate").get("clusters", {})
    return pd.DataFrame({name: np.asarray(values) for name, values in table.items()}).to_dict("records")


def audit_rows(adata: Any) -> dict[str, Any]:
    """Cells of each verdict of `audit`, and the most doubtful cells; empty without an audit."""
    if f"{KEY}_audit" not in adata.obs:
        return {}
    obs = adata.obs.sort_values(f"{KEY}_audit_score", ascending=False, kind="stable")
    bad = obs[obs[f"{KEY}_audit"].isin(["contradicted", "doubtful"])].head(SHOWN)
    given = str(adata.uns[KEY]["audit"]["label_key"])
    columns = {"given": given, **{name: f"{KEY}_audit_{name}" for name in ("suggested", "score", "genes")}}
    rows = [{"cell": name, **{c: row[column] for c, column in columns.items()}} for name, row in bad.iterrows()]
    return {"counts": adata.obs[f"{KEY}_audit"].value_counts().to_dict(), "rows": rows, "label_key": given}


def description_rows(adata: Any) -> list[dict[str, str]]:
    """The description of the surest cell of each label; empty without descriptions."""
    if f"{KEY}_description" not in adata.obs:
        return []
    surest = adata.obs.sort_values(f"{KEY}_score", ascending=False, kind="stable")
    surest = surest[surest[f"{KEY}_description"].astype(str) != ""]
    surest = surest.drop_duplicates(f"{KEY}_cell_type")
    return [
        {"label": str(row[f"{KEY}_cell_type"]), "cell": str(name), "text": str(row[f"{KEY}_description"])}
        for name, row in surest.iterrows()
    ]


def group_rows(described: Mapping[str, Any]) -> list[dict[str, str]]:
    """The descriptions of types and clusters with proof, the largest first; empty without them."""
    table = pd.DataFrame({name: np.asarray(values) for name, values in described.get("groups", {}).items()})
    if table.empty:
        return []
    table = table.sort_values(["level", "cells"], ascending=False, kind="stable")
    names = {"label": "", "cluster": "cluster "}
    return [{"label": f"{names[row['level']]}{row['name']}", "text": row["text"]} for row in table.to_dict("records")]


def input_facts(read: Mapping[str, Any]) -> dict[str, Any]:
    """How the file was read, in words."""
    matrix, genes = read.get("matrix", {}), read.get("genes", {})
    share, kind = genes.get("share_expression_matched"), str(matrix.get("kind"))
    kind = KIND_WORDS.get(kind, kind)
    facts = {
        "matrix": f"{matrix['chosen']}: {kind}, {matrix['conversion']}" if "chosen" in matrix else None,
        "species": genes.get("species"),
        "genes": f"{genes['genes']:,}" if "genes" in genes else None,
        "genes of the checkpoint": f"{genes['matched']:,}" if "matched" in genes else None,
        "share of the expression in them": f"{100 * share:.3g} %" if share is not None else None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def receipt_facts(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt in words."""
    return {name: dict(value) if isinstance(value, Mapping) else str(value) for name, value in receipt.items()}
