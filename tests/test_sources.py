"""nanomaml/sources.py: what people have becomes documents, or is refused in one line."""
import errno
import gzip
import json
import os
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refuses

from nanomaml import sources
from nanomaml.sources import find_files, read_documents

PROSE = "Das Mädchen sagte „naïve“ Dinge über 日本."
PACKS = {"txt": bytes, "gz": gzip.compress, "zst": sources.zstd.compress}


def read(*arguments, **options):
    return list(read_documents(*arguments, **options))


# ---- text ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.TXT.gz"])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path, encoding, name):
    """It became a token, ended a .jsonl file, or was three letters in latin-1; UTF-16 became U+FFFD."""
    content = (json.dumps({"text": PROSE}) + "\n" if "json" in name else PROSE).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name, "text") == [PROSE]
    assert encoding == "utf-8" or read(tmp_path / name, "text", "latin-1") == [PROSE]


@pytest.mark.parametrize("before", [0, 5, 100_000, 1_000_001])
@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.txt.zst"])
def test_bytes_that_are_no_utf8_are_refused_by_file_and_offset(tmp_path, before, name):
    """They became U+FFFD without a word."""
    content = b"word\n" * (before // 5) + b"." * (before % 5) + b"\xe9t\xe9" + b" words" * 50_000
    path = tmp_path / name
    path.write_bytes(PACKS[name.split(".")[-1]](content))
    refuses(lambda: read(path, "text"), name, f"byte {before:,} (0xe9)", "--encoding=")
    assert sum(text.count("été") for text in read(path, "text", "latin-1")) == 1


def test_utf16_without_a_mark_is_refused_in_one_line(tmp_path):
    """It is valid UTF-8, full of zeros; for --encoding=utf-16 each Python has an error of another class."""
    (tmp_path / "a.txt").write_bytes("plain words".encode("utf-16-le"))
    for name in ("utf-8", "utf-16", "utf16", "utf-32"):
        says = "a.txt: no byte-order mark", "--encoding=utf-16-le"
        refuses(lambda name=name: read(tmp_path / "a.txt", "text", name), *says)
    assert read(tmp_path / "a.txt", "text", "utf-16-le") == ["plain words"]


def test_where_a_document_ends(tmp_path):
    """The nine tokens of a line <|endoftext|>, as in TinyStories' files, were trained on. json reads half a
    surrogate pair, which no tokenizer or file can write. A long text is cut, so that memory stays bounded.
    """
    for name, content, documents in (
        ("a.txt", "\n \n\n", []), ("a.txt", "one\n\nmore\n \n\t\n\ntwo", ["one\n\nmore", "two"]),
        ("a.md", "one\n<|endoftext|>\ntwo\n<|endoftext|> \n<|mask|> <|endoftext|> x", 3),
        ("a.jsonl", "\ufeff" + '{"text": "x"}\n\n\ufeff{"text": "y"}\n', ["x", "y"]),  # cat a.jsonl b.jsonl
        ("a.json", '{"text": "a \\ud83d b \\ud83d\\ude00 c \\udc00"}', ["a \ufffd b \U0001f600 c \ufffd"]),
        ("long.txt", "a line of text\n" * 99_999, 23), ("long.txt", "no line ends " * 99_999, 20),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        found = read(tmp_path / name, "text")
        assert documents in (found, len(found)) and max(map(len, found), default=0) <= 2**17, name
        assert name != "long.txt" or " ".join(found).split() == content.split()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_of_several_parts_and_those_cut_short(tmp_path, suffix):
    """Some readers of zstandard end at the cut without an error: hours of text would be missing."""
    text, path = "".join(f"line {i}\n" for i in range(30_000)), tmp_path / f"a.txt.{suffix}"
    whole = b"".join(PACKS[suffix](part.encode()) for part in (text[:200_000], text[200_000:]))
    path.write_bytes(whole)
    assert "\n".join(read(path, "text")).split() == text.split()
    for content in (whole[:-9], whole[:len(whole) // 2], b"not packed", whole + b"other"):
        path.write_bytes(content)
        refuses(lambda: read(path, "text"), "cannot read", path.name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_unpacks_to_very_much_is_read_in_little_memory(tmp_path, suffix):
    """Its reading was quadratic, and unbounded: 24 KB that unpack to 269 MB did not end."""
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(PACKS[suffix]((b"words of a line " * 1000 + b"\n") * 2**11))
    tracemalloc.start()
    assert sum(map(len, read_documents(path, "text"))) > 3.2e7
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


# ---- names ----


def test_a_folder_is_read_whatever_the_case_and_the_rest_is_listed(tmp_path, monkeypatch):
    """C.TXT, .json.gz and links were passed over in silence; a dataset_infos.json was read as rows."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "C.TXT").write_text("upper case")
    (tmp_path / "a.JSONL").write_text('{"text": "line"}\n')
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    skipped = {"notes.pdf", ".hidden.txt", ".git/description.md", "dataset_infos.json", "state.json"}
    for name in skipped:
        (tmp_path / name).write_text('{\n "description": ""\n}\n')
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "sub" / "loop").symlink_to("..")
    for folder in (tmp_path, tmp_path / "sub" / "loop"):
        assert read(folder, "text") == ["upper case", "line", "packed"]
    others = {str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))[1]}
    assert others == skipped | {"link.txt", "sub/loop"}
    refuses(lambda: find_files(f"{tmp_path}/sub"), "sub holds no file to read", "links to folders are not")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("/sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)  # a folder that may not be read was passed over in silence
    assert tmp_path / "sub" in find_files(str(tmp_path))[1]


def test_a_file_that_is_not_there_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    """For x.csv that took 28 seconds. A misspelt `corpus` was looked for, and `json` loads other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    refuses(lambda: find_files("here"), "here holds no file to read")
    for name in """nowhere.txt ./nowhere /nowhere ../nowhere ~/nowhere .nowhere x.Parquet a/b/c x.jsonl.zst
                a/x.tsv a/x.zip x.pdf a/x.tar.gz x.7z a/x.xz a/x.npy a/x.arrow json parquet:data here:train
                here::train x.csv corpus C:\\nowhere""".split() + ["./" + "long" * 1000]:
        refuses(lambda name=name: find_files(name), f"{name}: no such file")
    monkeypatch.setattr(sources, "zstd", None)
    for name, package in (("a.parquet", "pyarrow"), ("a.txt.zst", "backports.zstd"), ("a/b", "datasets")):
        (tmp_path / name.replace("a/b", "c")).write_text("")
        monkeypatch.setitem(sys.modules, package, None)
        refuses(lambda name=name: read(name, "text"), name, f"pip install {package}")


# ---- Parquet and datasets ----


@pytest.fixture
def saved(tmp_path):
    """A folder with rows of text and of token ids as Parquet, and as the library datasets saves them."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": list(range(2500)), "text": [f"row {i}" for i in range(2500)]})
    rows.to_parquet(tmp_path / "te,xt" / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], []]}).to_parquet(tmp_path / "ids.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["te,xt", "te,xt/a.parquet"])
def test_parquet_files(saved, name):
    assert read(saved / name, "text") == [f"row {i}" for i in range(2500)]
    refuses(lambda: read(saved / name, "body"), "row 1", "no 'body' field among id, text", "text_key")
    refuses(lambda: read(saved / name, "id"), "row 1", "not text: 0")
    for names in ([], [str(saved / name), "x"], ["user/name:a", str(saved / name)]):  # with commas in paths
        assert sources.split_list(",".join(names)) == sources.split_list(",, ,".join(names)) == names


def test_rows_of_token_ids_are_arrays(saved):
    ids, empty = read(saved / "ids.parquet", "text", n_ids=4)
    assert ids.tolist() == [1, 2, 3] and ids.dtype == empty.dtype == np.int64 and len(empty) == 0
    refuses(lambda: read(saved / "ids.parquet", "text"), "row 1", "token ids", "--tokenizer=gpt2")


def test_what_cannot_be_read_says_what_to_do(saved):
    refuses(lambda: read(saved / "saved", "text"), "holds no file to read", "to_parquet")
    (saved / "bad.parquet").write_bytes(b"PAR1 and no more")
    refuses(lambda: read(saved / "bad.parquet", "text"), "cannot read", "bad.")


def test_a_dataset_is_asked_for_its_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(name, subset, split, streaming):
        asked.append([name, subset, split])
        yield {"text": "row"}
        raise OSError("the network\nis gone")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, *means in (("a/x-v1.5", "a/x-v1.5", None, "train"), ("a/x:2023.en", "a/x", "2023.en", "train"),
                         ("a/x:b:test", "a/x", "b", "test"), ("a/x.y::test[:5]", "a/x.y", None, "test[:5]")):
        documents = read_documents(name, "text")
        assert next(documents) == "row" and asked.pop() == means
        refuses(lambda documents=documents: next(documents), name, "row 1: OSError: the network is gone")


# ---- rows ----


@pytest.mark.parametrize("row, says", [
    ('{"txt": "x"}', "no 'text' field among txt"), ("{}", "no 'text' field"),
    ('{"text": 3}', "'text' is not text: 3"), ('{"text": {}}', "'text' is not text: {}"),
    ("[", "not a JSON object: '['; jq -c '.[]'"), ("[" * 900, "not a JSON object"),
    ("[" + '{"text": "x"}, ' * 100, "not a JSON object"),  # an array of any size in one line
    ('{"text": [1, true]}', "'text' holds True"), ('{"text": [null]}', "'text' holds None"),
    ('{"text": [1, -1]}', "'text' holds -1"), ('{"text": [1, 2.0]}', "'text' holds 2.0"),
    ('{"input_ids": [1, "a"]}', "'input_ids' holds 'a'"), ('{"input_ids": [1, 300]}', "300, not one of the"),
    ('{"input_ids": [9223372036854775808]}', "holds 9223372036854775808"),
])
def test_a_row_that_is_neither_text_nor_ids_is_named(tmp_path, monkeypatch, row, says):
    """Ids of 2**63 ended in an OverflowError; one outside the vocabulary was told without its row."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    (tmp_path / "a.json").write_text('{"text": "fine"}\n\n' + row + "\n")
    refuses(lambda: read(tmp_path / "a.json", "text", n_ids=300), "a.json, line 3: ", says)
