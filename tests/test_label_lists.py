"""Files of labels as people write them."""

import pytest

from scmmgpt.readers.label_lists import read_label_list, read_words


TABLE = "label,text,cl_id\nB cell,makes antibodies,CL:0000236\nT cell,,\n"
CASES = {
    "a label a line": ("labels.txt", b"B cell\n\n T  cell \n"),
    "lines of Windows": ("labels.txt", b"B cell\r\nT cell\r\n"),
    "a table": ("labels.csv", TABLE.encode()),
    "a table with a byte-order mark, as Excel writes it": ("labels.csv", TABLE.encode("utf-8-sig")),
    "semicolons, as Excel writes them in Europe": ("labels.csv", TABLE.replace(",", ";").encode("utf-8-sig")),
    "tabs": ("labels.tsv", TABLE.replace(",", "\t").encode()),
    "Unicode text of Excel": ("labels.txt", TABLE.replace(",", "\t").encode("utf-16")),
    "names of columns in capitals": ("labels.csv", TABLE.replace("label", " Label").encode()),
    "empty fields after a row, as a spreadsheet writes them": ("labels.csv", TABLE.replace("\n", ",,\n").encode()),
    "rows without their empty fields": ("labels.csv", TABLE.replace("T cell,,", "T cell").encode()),
    "a list without a header": ("labels.csv", b"B cell\nT cell\n"),
    "comments among the labels": ("labels.txt", b"# of blood\nB cell\n  # T\nT cell\n"),
    "a comment before a table": ("labels.csv", ("# of blood\n" + TABLE).encode()),
    "JSON, a list": ("labels.json", b'["B cell", "T cell"]'),
    "JSON, texts, with a byte-order mark": (
        "labels.json",
        '{"B cell": "makes antibodies", "T cell": ""}'.encode("utf-8-sig"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_way_to_write_labels_gives_the_labels(name, tmp_path):
    file, content = CASES[name]
    (tmp_path / file).write_bytes(content)
    found = read_label_list(tmp_path / file)
    assert found.labels == ["B cell", "T cell"]
    if b"antibodies" in content.replace(b"\0", b""):
        assert found.texts == {"B cell": "makes antibodies"}
    if b"CL:" in content:
        assert found.cl_ids == {"B cell": "CL:0000236"}


def test_letters_beyond_ascii_survive_the_encoding_of_windows(tmp_path):
    (tmp_path / "labels.csv").write_bytes("label;text\nKupffer-Zelle;für Leber\n".encode("cp1252"))
    assert read_label_list(tmp_path / "labels.csv").texts == {"Kupffer-Zelle": "für Leber"}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("labels.csv", b"name,text\nB,b\n", "no column 'label'; it has"),
        ("labels.csv", b"label,text\n,words\n", "Entry 2 of .* has no label"),
        ("labels.csv", b"label,text\nB,one\nB,two\n", "describes 'B' twice"),
        ("labels.txt", b"\n \n", "has no labels"),
        ("labels.csv", b"label,text\nB,of blood, and lymph\n", "Entry 2 of .* has 3 fields for 2 columns"),
        ("labels.json", b'{"B": 3}', "Write {label: text} or a list"),
        ("labels.json", b"[1, 2]", "Write each label as a string"),
        ("labels.json", b"[", "not JSON"),
        ("labels.txt", b"\x89PNG\0\0", "not a text file"),
        ("labels.xlsx", b"PK", "Save it as CSV"),
        ("labels.yaml", b"- B cell\n- T cell\n", "not a list of labels"),
        ("labels.txt", b"# only\n", "has no labels"),
    ],
)
def test_a_file_without_labels_is_refused(tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_label_list(tmp_path / file)


def test_labels_stand_alone_or_in_one_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("B cell\n")
    assert read_words(["B cell", " T  cell ", "B cell"]).labels == ["B cell", "T cell"]
    assert read_words([str(path)]).labels == ["B cell"]
    with pytest.raises(ValueError, match="Give either one file or only labels"):
        read_words(["T cell", str(path)])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        read_words([str(tmp_path / "missing.txt")])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt is a folder"):
        read_words([str(tmp_path / "folder.txt")])
    with pytest.raises(ValueError, match="A label is empty"):
        read_words(["B", " "])
    with pytest.raises(ValueError, match='"B cell" "T cell"'):
        read_words(["B cell,T cell"])
    assert read_words(["CD4-positive, alpha-beta T cell"]).labels == ["CD4-positive, alpha-beta T cell"]
