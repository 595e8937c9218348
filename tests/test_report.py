"""The report on a small corpus: one page that needs nothing else, and says where the model loses."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.eval import annotation, baselines, description, figures, generation
from scmmgpt.eval.__main__ import main as evaluate
from scmmgpt.eval.cells import read_splits
from scmmgpt.eval.provenance import describe_checkpoint, read_training, trained_elsewhere
from scmmgpt.eval.report import headline, verdicts
from scmmgpt.eval.results import MODEL_NAME
from scmmgpt.synthetic import synthetic_adata
from scmmgpt.tests.corpora import write_corpus
from scmmgpt.train.curves import training_figure
from scmmgpt.train.data.corpus import open_corpus


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A corpus of synthetic cells and, as if a model had made them, annotations, descriptions and generated cells.

    Types are named right; descriptions name the wrong type for one cell in two; generated cells are drawn
    from mean profiles.
    """
    folder = tmp_path_factory.mktemp("demo")
    adata = synthetic_adata(260, mean_total=100.0)
    genes = [*adata.var_names, "SILENT"]  # a gene that no cell expresses
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<cls>", "<eoc>", *genes])}
    ids = np.array([vocabulary[symbol] for symbol in adata.var_names])
    splits = {}
    for split, rows in (("train", slice(0, 160)), ("validation", slice(160, 180)), ("test", slice(180, 260))):
        part = adata[rows]
        obs = {
            "barcode": part.obs_names.to_numpy(),
            "dataset_id": np.resize(["one", "two", "two"], len(part)),
            **{name: part.obs[name].astype(str).to_numpy() for name in ("cell_type", "cell_type_ontology_term_id")},
        }
        splits[split] = (Cells.from_csr(part.X, ids, cell_ids=hash_names(part.obs_names)), obs)
    write_corpus(folder / "corpus", vocabulary, splits, split_by="cell", sources=[{"name": "synthetic"}])

    train, test = read_splits(folder / "corpus")
    names = pd.Index(test.names, name="barcode")
    obs = pd.DataFrame({"scmmgpt_cell_type": test.labels, "scmmgpt_score": 0.9}, index=names)
    settings = {"annotate": {"matching_weight": 0.25, "labels": np.unique(test.labels)}}
    annotated = anndata.AnnData(sparse.csr_matrix((len(test), 1)), obs=obs, uns={"scmmgpt": settings})
    annotated.write_h5ad(folder / "annotated.h5ad")
    wrong = np.where(np.arange(len(test)) % 2, np.roll(test.labels, 1), test.labels)
    texts = pd.DataFrame({"scmmgpt_description": [f"This cell is a {label}." for label in wrong]}, index=names)
    texts.to_csv(folder / "descriptions.csv", index_label="cell")
    prompts = np.repeat(np.unique(test.labels), 10)
    generated = anndata.AnnData(
        baselines.poisson_cells(prompts, train, seed=3),
        obs=pd.DataFrame({"label": prompts}, index=[f"generated{i}" for i in range(len(prompts))]),
        var=pd.DataFrame(index=train.genes),
    )
    generated.write_h5ad(folder / "generated.h5ad")
    (folder / "align").mkdir()
    log = [{"step": i, "loss": 3.0 / i, "contrast_loss": 2.0 / i} for i in (1, 2, 3)] + [{"step": 3, "eval_loss": 1.5}]
    (folder / "align" / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": log}))
    return folder


@pytest.fixture(scope="module")
def arguments(demo):
    return [
        *("--corpus", str(demo / "corpus"), "--annotated", str(demo / "annotated.h5ad")),
        *("--descriptions", str(demo / "descriptions.csv"), "--generated", str(demo / "generated.h5ad")),
        *("--training", str(demo / "align"), "--note", "Made by hand & not by a model."),
    ]


@pytest.fixture(scope="module")
def report(arguments, demo):
    """Folder of a written report."""
    assert evaluate(["report", *arguments, "--output", str(demo / "results")]) == 0
    return demo / "results"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))


def test_every_picture_has_a_text_for_those_who_cannot_see_it(page):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 6  # confusion, calibration, two maps, markers, one training curve
    assert all(len(picture["alt"]) > 20 for picture in pictures)


def test_every_number_stands_beside_its_baselines(page):
    for name in (
        *("logistic regression", "majority class", "nearest centroid", "shuffled labels"),
        *("label-only caption, true label", "label of logistic regression", "shuffled descriptions"),
        *("mean profile", "mean profile + Poisson", "real training cells", "shuffled prompts"),
    ):
        assert name in page.text


def test_the_page_opens_with_what_is_lost(page, report):
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    lost = [c for c in metrics["description"]["comparisons"] if c["verdict"] == "worse"]
    assert "names true type" in {metrics["description"]["measures"][c["metric"]]["title"] for c in lost}
    assert page.text.index("Losses (") < page.text.index("Wins (") < page.text.index("Confusion matrix")
    assert "Worse than the best baseline" in page.text


def test_a_note_is_escaped(page, report):
    assert "Made by hand & not by a model." in page.text
    assert "hand &amp; not" in (report / "report.html").read_text(encoding="utf-8")


def test_metrics_hold_values_intervals_and_provenance(report):
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    accuracy = {row["system"]: row for row in metrics["annotation"]["rows"] if row["metric"] == "accuracy"}
    assert accuracy[MODEL_NAME]["value"] == 1
    assert accuracy[MODEL_NAME]["n"] == 80
    assert accuracy["majority class"]["ci"][0] <= 0.25 <= accuracy["majority class"]["ci"][1]
    named = {
        row["system"]: row["value"] for row in metrics["description"]["rows"] if row["metric"] == "named_type_accuracy"
    }
    assert named[MODEL_NAME] == 0.5
    provenance = metrics["provenance"]
    assert provenance["corpus"]["split by"] == "cell"
    assert len(provenance["corpus"]["manifest sha256"]) == len(provenance["corpus"]["splits sha256"]) == 64
    assert provenance["settings"] == {"annotate": {"matching_weight": 0.25}}
    assert set(provenance["versions"]) >= {"python", "torch", "scikit-learn"}


def test_tasks_alone_give_the_numbers_of_the_report(report, demo, tmp_path, capsys):
    output = tmp_path / "annotation.json"
    common = ["--corpus", str(demo / "corpus"), "--output", str(output)]
    assert evaluate(["annotation", *common, "--annotated", str(demo / "annotated.h5ad")]) == 0
    together = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["annotation"]
    assert json.loads(output.read_text(encoding="utf-8")) == together
    assert "logistic regression" in capsys.readouterr().out


def test_counts_are_normalised_by_the_library_size_of_the_whole_cell(tmp_path):
    counts = sparse.csr_matrix(np.array([[5.0, 0.0], [0.0, 10.0]]))
    obs = pd.DataFrame({"label": ["a", "b"], "library_size": [1000.0, 5000.0]}, index=["x", "y"])
    adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=["G1", "G2"]))
    adata.layers["counts"] = counts
    adata.write_h5ad(tmp_path / "generated.h5ad")
    matrix, prompts, genes, sizes = generation.read_generated(str(tmp_path / "generated.h5ad"))
    np.testing.assert_allclose(matrix, np.log1p([[50.0, 0.0], [0.0, 20.0]]), rtol=1e-6)
    assert prompts.tolist() == ["a", "b"]
    assert genes.tolist() == ["G1", "G2"]
    assert sizes.tolist() == [1000, 5000]


def test_generated_cells_are_compared_with_some_datasets_of_a_split(demo, tmp_path, capsys):
    files = ["--corpus", str(demo / "corpus"), "--generated", str(demo / "generated.h5ad")]
    output = tmp_path / "generation.json"
    assert evaluate(["generation", *files, "--datasets", "two", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert (result["n_train"], result["n_real"]) == (106, 53)
    assert evaluate(["generation", *files, "--split", "validation", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["n_real"] == 20
    assert evaluate(["generation", *files, "--datasets", "three", "--output", str(output)]) != 0
    assert "No cell is of ['three']. The datasets of these cells are ['one', 'two']." in capsys.readouterr().err


def test_cells_are_matched_by_barcode_in_any_order(demo):
    _, test = read_splits(demo / "corpus")
    shuffled = test.take(np.random.default_rng(0).permutation(len(test)))
    keys = "scmmgpt_cell_type", "scmmgpt_score"
    rows, predictions, _ = annotation.read_annotated(str(demo / "annotated.h5ad"), shuffled, *keys)
    np.testing.assert_array_equal(predictions, shuffled.labels[rows])


def test_cells_of_another_set_are_refused(demo, tmp_path, capsys):
    adata = anndata.AnnData(np.ones((2, 1)), obs=pd.DataFrame({"scmmgpt_cell_type": ["a", "b"]}, index=["p", "q"]))
    adata.write_h5ad(tmp_path / "other.h5ad")
    arguments = ["--corpus", str(demo / "corpus"), "--annotated", str(tmp_path / "other.h5ad")]
    assert evaluate(["annotation", *arguments, "--output", str(tmp_path / "out.json")]) == 2
    assert "None of the 2 cells" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_one_task_makes_a_report(demo, tmp_path):
    arguments = ["--corpus", str(demo / "corpus"), "--annotated", str(demo / "annotated.h5ad")]
    assert evaluate(["report", *arguments, "--score-key", "absent", "--output", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "Confusion matrix" in page.text
    assert "Samples beside the true types" not in page.text


def test_a_report_of_nothing_is_refused(demo, tmp_path, capsys):
    assert evaluate(["report", "--corpus", str(demo / "corpus"), "--output", str(tmp_path / "out")]) == 2
    assert "Nothing to report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_named(demo, tmp_path):
    _, test = read_splits(demo / "corpus")
    (tmp_path / "texts.csv").write_text("cell,words\nx,y\n")
    with pytest.raises(ValueError, match=r"none of the columns \['scmmgpt_description', 'description'\].*'words'"):
        description.read_descriptions(str(tmp_path / "texts.csv"), test)


def test_the_last_checkpoint_serves_where_a_run_left_no_final_log(tmp_path):
    for step in (20, 100):
        folder = tmp_path / "tune" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    assert read_training([tmp_path / "tune"])[0]["steps"] == 100


def test_a_checkpoint_is_described_without_loading_it(tmp_path):
    from safetensors.numpy import save_file

    save_file(
        {"a": np.zeros((3, 4), dtype=np.float32), "b": np.zeros(5, dtype=np.float32)}, tmp_path / "model.safetensors"
    )
    config = {"architectures": ["X"], "text_config": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    described = describe_checkpoint(tmp_path)
    assert described["parameters"] == 17
    assert described["language model"] == "llama: 2 layers, 8 wide"


def test_a_checkpoint_of_another_corpus_is_warned_of(demo, tmp_path):
    corpus = open_corpus(demo / "corpus")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    for trained_on, expected in ((other, True), (demo / "corpus", False), (tmp_path / "gone", False)):
        (tmp_path / "training.json").write_text(json.dumps({"data": {"corpus": str(trained_on)}}))
        assert bool(trained_elsewhere(tmp_path, corpus)) is expected


def test_verdicts_tell_losses_from_draws():
    def row(system, role, **measured):
        return {"metric": "m", "system": system, "role": role, **measured}

    lost = {"difference": -0.1, "ci": [-0.2, -0.05], "verdict": "worse"}
    drawn = {"difference": 0.0, "ci": [-0.1, 0.1], "verdict": "unclear"}
    values = [("ours", "model", 0.5), ("a", "baseline", 0.6), ("b", "baseline", 0.5), ("s", "control", 0.5)]
    result = {
        "model": "ours",
        "measures": {"m": {"title": "M", "higher_is_better": True, "about": ""}},
        "rows": [row(system, role, value=value, ci=None, n=1) for system, role, value in values],
        "comparisons": [row("a", "baseline", **lost), row("b", "baseline", **drawn), row("s", "control", **drawn)],
    }
    found = {name: len(entries) for name, entries in verdicts({"annotation": result}).items()}
    assert found == {"worse": 1, "unclear": 1, "better": 0, "control": 1}
    assert headline("annotation", result)["best"]["system"] == "a"


def test_training_imports_nothing_of_evaluation_and_nothing_imports_a_command_line():
    root = Path(__file__).parents[1]
    for path in [*(root / "train").rglob("*.py"), *(root / "eval").rglob("*.py")]:
        imports = re.findall(r"^\s*(?:from|import) (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if "train" in path.relative_to(root).parts:
            assert not [name for name in imports if name.startswith("scmmgpt.eval")], path
        assert not [name for name in imports if "__main__" in name], path


def test_curves_pair_training_and_validation_by_colour():
    history = [{"step": s, "loss": 3 / s, "contrast_loss": 2 / s, "train_loss": 9.0} for s in (1, 2)]
    history += [{"step": 2, "eval_contrast_loss": 1.5, "eval_recall": 0.5, "eval_loss": float("nan")}]
    losses, shares = training_figure(history).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "contrast", "contrast, validation"]
    assert losses.lines[1].get_color() == losses.lines[2].get_color() != losses.lines[0].get_color()
    assert [line.get_label() for line in shares.lines] == ["recall"]
    assert training_figure([{"step": 1, "train_loss": 1.0}]) is None


def test_a_label_with_dollar_signs_is_drawn_as_it_is():
    labels = [r"bad $\frac{1$ cell", "costs $5 or $6"]
    confusion = {"labels": labels, "columns": labels, "counts": [[3, 1], [0, 2]]}
    picture = base64.b64decode(figures.data_uri(figures.confusion_figure(confusion)).partition(",")[2]).decode()
    assert picture.startswith("<?xml")
