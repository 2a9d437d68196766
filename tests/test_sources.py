"""sources.py: what people have becomes documents, or is refused in one line."""

import gzip
import json
import sys

import numpy as np
import pytest
from conftest import refuses

import sources
from sources import find_files, read_documents

PROSE = "Das Mädchen sagte „naïve“ Dinge über 日本."


def read(*arguments, **options):
    return list(read_documents(*arguments, **options))


# ---- text ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.TXT.gz"])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path, encoding, name):
    """The mark became a token of the first document, or ended a .jsonl file; UTF-16 became U+FFFD."""
    text = json.dumps({"text": PROSE}) + "\n" if "json" in name else PROSE
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_documents(tmp_path / name, "text")) == [PROSE]
    if encoding == "utf-8-sig":  # cat a.jsonl b.jsonl
        (tmp_path / "joined.jsonl").write_bytes((json.dumps({"text": "x"}) + "\n").encode(encoding) * 2)
        assert list(read_documents(tmp_path / "joined.jsonl", "text")) == ["x", "x"]


@pytest.mark.parametrize("before", [0, 5, 100_000, 1_000_001])
@pytest.mark.parametrize("name", ["a.txt", "a.md.gz"])
def test_bytes_that_are_no_utf8_are_refused_by_file_and_offset(tmp_path, before, name):
    """They became U+FFFD without a word."""
    content = b"word\n" * (before // 5) + b"." * (before % 5) + b"\xe9t\xe9" + b" words" * 50_000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = str(tmp_path / name)
    refuses(lambda: list(read_documents(source, "text")), name, f"byte {before:,} (0xe9)", "--encoding=")
    documents = read_documents(source, "text", "latin-1")
    assert sum(text.count("\u00e9t\u00e9") for text in documents) == 1


def test_a_utf8_mark_outweighs_the_encoding_that_is_given(tmp_path):
    """With --encoding=latin-1 the mark became three letters."""
    (tmp_path / "a.txt").write_bytes(PROSE.encode("utf-8-sig"))
    assert read(tmp_path / "a.txt", "text", "latin-1") == [PROSE]


def test_utf16_without_a_mark_is_refused_in_one_line(tmp_path):
    """It is valid UTF-8, full of zeros; --encoding=utf-16 ended in a UnicodeError, no UnicodeDecodeError."""
    (tmp_path / "a.txt").write_bytes("plain words".encode("utf-16-le"))
    refuses(lambda: read(tmp_path / "a.txt", "text"), "a.txt", "--encoding=utf-16-le")
    for name in ("utf-16", "utf16"):
        says = "a.txt: no byte-order mark", "--encoding=utf-16-le"
        refuses(lambda name=name: read(tmp_path / "a.txt", "text", name), *says)
    assert read(tmp_path / "a.txt", "text", "utf-16-le") == ["plain words"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    """json reads it, and no tokenizer or file can write it."""
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00 c \\udc00"}\n')
    assert list(read_documents(tmp_path / "a.jsonl", "text")) == ["a \ufffd b \U0001f600 c \ufffd"]


def test_a_long_text_without_blank_lines_is_cut_so_that_memory_stays_bounded(tmp_path):
    for text in ("a line of text\n" * 200_000, "no line ends " * 200_000):
        (tmp_path / "a.txt").write_text(text)
        sizes = [len(part) for part in read_documents(tmp_path / "a.txt", "text")]
        assert max(sizes) <= 2**17 and len(sizes) > 1 and sum(sizes) > len(text) - 100


def test_a_line_that_says_endoftext_separates_documents(tmp_path):
    """TinyStories' files have such lines; the nine tokens of their letters were trained on."""
    text = "one\n\nmore\n<|endoftext|>\ntwo\n<|endoftext|> \n<|mask|> <|endoftext|> x\n"
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt", "text") == ["one\n\nmore", "two", "<|mask|> <|endoftext|> x"]


def test_a_line_of_json_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    """A file of one array in one line, of any size."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n[' + '{"text": "x"}, ' * 10_000)
    documents = read_documents(tmp_path / "a.jsonl", "text")
    assert next(documents) == "fine"
    refuses(lambda: next(documents), "a.jsonl, line 2: over 1,000 characters")


# ---- names ----


def test_a_folder_is_read_whatever_the_case_and_the_rest_is_listed(tmp_path):
    """C.TXT and .json.gz were passed over in silence, and so was a link to nowhere."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "C.TXT").write_text("upper case")
    (tmp_path / "a.JSONL").write_text('{"text": "line"}\n')
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    for name in ("notes.pdf", ".hidden.txt", ".git/description.md"):
        (tmp_path / name).write_text("not this")
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    assert read(tmp_path, "text") == ["upper case", "line", "packed"]
    others = {path.name for path in find_files(str(tmp_path))[1]}
    assert others == {"notes.pdf", ".hidden.txt", "description.md", "link.txt", "loop"}


def test_a_link_to_a_folder_within_a_folder_is_not_passed_over_in_silence(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("words")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "corpus").symlink_to("../there")
    refuses(lambda: find_files(str(tmp_path / "in")), "in holds no file to read",
            f"{tmp_path}/in/corpus is a link to a folder: name that itself")
    assert read(tmp_path / "in" / "corpus", "text") == ["words"]


NO_FILES = """nowhere.txt ./nowhere /nowhere ../nowhere ~/nowhere .nowhere x.Parquet a/b/c x.jsonl.zst x.csv
a/x.tsv x.zip x.pdf x.html x.xml x.tar x.tar.gz x.7z x.bz2 x.xz x.docx x.epub x.npy x.bin x.arrow x.py
C:\\nowhere""".split() + ["./" + "long" * 1000, "nul\0"]


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_is_not_there_is_not_looked_for_on_a_hub(name):
    """For x.csv, x.zip and the like that took 28 seconds."""
    refuses(lambda: find_files(name), f"{name}: no such file")


def test_names_that_are_datasets_or_look_like_it(tmp_path, monkeypatch):
    """A misspelt folder, `corpus`, was looked for on the hub; `json` loads a builder."""
    monkeypatch.chdir(tmp_path)
    for name in ("user/name", "user/name-v1.5:subset", "user/name::test[:5]", "name:2023.en", "name::train"):
        assert find_files(name) == ([], [])
    for name in ("json", "parquet:data", "csv", "JSON:x"):
        refuses(lambda name=name: find_files(name), f"{name}: ", "is a file format")
    refuses(lambda: find_files("corpus"), "corpus: no such file or folder", "corpus::train")
    (tmp_path / "corpus").mkdir()
    refuses(lambda: find_files("corpus"), "holds no file to read")
    refuses(lambda: find_files("corpus:train"), "corpus is no dataset that save_to_disk wrote", "out :train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses(lambda: read("user/name:subset:split", "text"), "user/name", "pip install datasets")
    (tmp_path / "a.pdf").write_text("%PDF")
    refuses(lambda: find_files("a.pdf"), "a.pdf", ".jsonl")


def test_files_that_need_a_package_say_so(tmp_path, monkeypatch):
    for package, name in (("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_text("")
        refuses(lambda name=name: read(tmp_path / name, "text"), name, f"pip install {package}")


def test_a_path_may_hold_a_comma(tmp_path):
    (tmp_path / "one, two").mkdir()
    for name in ("one, two/a,b.txt", "c.txt"):
        (tmp_path / name).write_text(f"words of {name}")
    source = f"{tmp_path}/one, two/a,b.txt,{tmp_path}/c.txt"
    assert sources.split_list(source) == [f"{tmp_path}/one, two/a,b.txt", f"{tmp_path}/c.txt"]
    assert sources.split_list(f"{tmp_path}/one, two,,user/name:a") == [f"{tmp_path}/one, two", "user/name:a"]
    assert sources.split_list(",, ,") == []


def test_the_builders_of_the_installed_library_are_known():
    """`eval:x`, `conll` and others were taken for datasets, and these look for files beside the command."""
    known = pytest.importorskip("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES
    assert set(known) <= sources.BUILDERS


def test_metadata_of_datasets_hold_no_rows(tmp_path):
    """A pretty-printed dataset_infos.json in a folder of Parquet files ended the preparation."""
    (tmp_path / "a.jsonl").write_text('{"text": "row"}\n')
    for name in ("dataset_info.json", "dataset_infos.json", "sub/dataset_dict.json", "sub/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{\n "description": ""\n}\n')
    assert read(tmp_path, "text") == ["row"]
    assert len(find_files(str(tmp_path))[1]) == 4


# ---- compressed files, Parquet, datasets ----


def test_zstandard_files_and_those_cut_short(tmp_path):
    """zstandard's reader ends at the cut without an error: hours of text would be missing."""
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"line {i}\n" for i in range(100_000))
    frames = [zstandard.compress(part.encode()) for part in (text[:500_000], text[500_000:])]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    read = "\n".join(read_documents(tmp_path / "a.txt.zst", "text"))
    assert read.split() == text.split()
    for content in (b"".join(frames)[:-9], b"no zstandard at all"):
        (tmp_path / "a.txt.zst").write_bytes(content)
        refuses(lambda: list(read_documents(tmp_path / "a.txt.zst", "text")), "cannot read", "a.txt.zst")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x" * 100_000 + b"\xff"))
    refuses(lambda: list(read_documents(tmp_path / "a.txt.zst", "text")), "byte 100,000 (0xff)")


def test_parquet_files_and_saved_datasets(tmp_path):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    texts = [f"row number {i}" for i in range(2500)]
    table = pyarrow.table({"id": list(range(2500)), "text": texts})
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="0")
    rows.to_parquet(tmp_path / "in" / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")

    for source in ("in", "in/a.parquet", "saved", "dict", "dict/train"):
        assert read(tmp_path / source, "text") == texts, source
        says = "row 1", "no 'body' field among id, text", "text_key"
        refuses(lambda source=source: read(tmp_path / source, "body"), *says)
        refuses(lambda source=source: read(tmp_path / source, "id"), "row 1", "not text: 0")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    refuses(lambda: read(tmp_path / "bad.parquet", "text"), "cannot read", "bad.parquet")


def test_a_split_of_a_saved_dataset_can_be_named(tmp_path):
    """FOLDER::test was no such file, and FOLDER always its split train."""
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"text": [name]}, split=name) for name in ("test", "dev")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    splits["dev"].save_to_disk(tmp_path / "dev")
    for name in ("dict::test", "dict:test", "dict/test"):
        assert read(tmp_path / name, "text") == ["test"]
    assert read(tmp_path / "dev:dev", "text") == read(tmp_path / "dev", "text") == ["dev"]
    assert len({sources.dataset_identity(f"{tmp_path}/{name}") for name in (
        "dict::test", "dict:test", "dict/test", "./dict::test")}) == 1
    assert len({sources.dataset_identity(f"{tmp_path}/{name}") for name in (
        "dict::dev", "dict", "dict::train", "dev", "dev::dev")}) == 3
    (tmp_path / "dict").rename(tmp_path / "di,ct")
    names = [f"{tmp_path}/di,ct::test", f"{tmp_path}/dev::dev"]
    assert sources.split_list(",".join(names)) == names
    (tmp_path / "di,ct").rename(tmp_path / "dict")
    refuses(lambda: read(tmp_path / "dict", "text"), "no split train: it has test, dev", "dict::test")
    refuses(lambda: read(tmp_path / "dict::no", "text"), "has no split no")
    refuses(lambda: read(tmp_path / "dev::test", "text"), "dev holds one split (dev), not test")


def test_a_dataset_saved_as_tensors_is_read(tmp_path):
    """set_format("torch") is saved along: rows of token ids came as tensors."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]]}).with_format("torch")
    rows.save_to_disk(tmp_path / "saved")
    assert [ids.tolist() for ids in read(tmp_path / "saved", "text", n_ids=4)] == [[1, 2, 3]]


def test_a_dataset_is_asked_for_its_subset_and_split(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def load_dataset(name, subset, split, streaming):
            asked.append((name, subset, split))
            return [{"text": "row"}, {"text": 7}]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    for source in ("user/name", "user/name:subset", "user/name:subset:test", "name::test[:5]"):
        refuses(lambda source=source: list(read_documents(source, "text")), "row 2", "not text: 7")
    assert asked == [
        ("user/name", None, "train"),
        ("user/name", "subset", "train"),
        ("user/name", "subset", "test"),
        ("name", None, "test[:5]"),
    ]


# ---- rows ----


@pytest.mark.parametrize("row, says", [
    ('{"txt": "x"}', "no 'text' field among txt"),
    ('{"text": 3}', "'text' is not text: 3"),
    ('{"text": null}', "'text' is not text: None"),
    ('[', "no JSON object with a 'text' field: '['; each line is to hold one (jq -c '.[]'"),
    ('{"text": [1, true]}', "'text' is neither text nor token ids: it holds True"),
    ('{"text": [1, -1]}', "'text' is neither text nor token ids: it holds -1"),
    ('{"text": [1, 2.0]}', "'text' is neither text nor token ids: it holds 2.0"),
    ('{"text": [null]}', "'text' is neither text nor token ids: it holds None"),
    ('{"input_ids": [1, "a"]}', "'input_ids' is neither text nor token ids: it holds 'a'"),
    ('{"input_ids": [300, 301]}', "token id 301 is outside the tokenizer's 300 ids"),
    ('{"input_ids": [9223372036854775808]}', "token id 9223372036854775808 is outside"),
])
def test_a_row_that_is_neither_text_nor_ids_is_named(tmp_path, row, says):
    """Ids of 2**63 ended in an OverflowError; one outside the vocabulary was told without its row."""
    (tmp_path / "a.json").write_text('{"text": "fine"}\n\n' + row + "\n")
    refuses(lambda: read(tmp_path / "a.json", "text", n_ids=300), "a.json, line 3: ", says)


def test_rows_of_token_ids_are_arrays_for_those_who_name_their_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [0, 299]}\n{"input_ids": []}\n{"text": "both"}\n')
    first, empty, text = read(tmp_path / "a.jsonl", "text", n_ids=300)
    assert first.tolist() == [0, 299] and first.dtype == np.int64 and len(empty) == 0 and text == "both"
    refuses(lambda: read(tmp_path / "a.jsonl", "text"), "a.jsonl, line 1", "token ids", "--tokenizer=gpt2")
