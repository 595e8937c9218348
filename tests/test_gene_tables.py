"""Gene names of every kind lead to the vocabulary."""

import pytest

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.train.data.gene_tables import GeneRecord, build_gene_aliases, load_orthologs, resolve_names


RECORDS = [
    GeneRecord("RACK1", ("GNB2L1",), ("H12.3",), "ENSG00000204628"),
    GeneRecord("CXCL8", ("IL8",), ("SCYB8", "SHARED"), "ENSG00000169429"),
    GeneRecord("TNF", (), ("TNFA", "SHARED", "IL8"), "ENSG00000232810"),
]


def test_a_previous_symbol_leads_to_the_current_one():
    assert resolve_names(["RACK1"], RECORDS)["GNB2L1"] == "RACK1"


def test_the_current_symbol_leads_to_the_one_of_an_old_vocabulary():
    assert resolve_names(["GNB2L1"], RECORDS)["RACK1"] == "GNB2L1"


def test_a_previous_symbol_outranks_an_alias_of_another_gene():
    assert resolve_names(["CXCL8", "TNF"], RECORDS)["IL8"] == "CXCL8"


def test_a_name_that_two_genes_share_leads_to_neither():
    assert "SHARED" not in resolve_names(["CXCL8", "TNF"], RECORDS)


def test_a_name_of_the_vocabulary_is_never_redirected():
    assert "IL8" not in resolve_names(["CXCL8", "IL8"], RECORDS)


def test_ensembl_ids_and_orthologs_lead_to_the_vocabulary():
    pytest.importorskip("celltypist", reason="its tables are read", exc_type=ImportError)
    index = GeneIndex({"<pad>": 0, "CD3E": 1}, build_gene_aliases({"<pad>": 0, "CD3E": 1}))
    assert index.lookup("ENSG00000198851.11") == (1, "ensembl")
    assert index.lookup("Cd3e", "mouse") == (1, "ortholog")
    assert index.lookup("CD3E", "rhesus macaque") == (1, "ortholog")


def test_orthologs_are_one_to_one():
    table = load_orthologs("mouse")
    assert len(set(table.values())) == len(table) > 16000
