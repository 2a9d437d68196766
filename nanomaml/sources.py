"""Reads documents from text files, JSON lines, Parquet and Hugging Face datasets.

    for document in sources.read_documents("corpus/", "text"):         # a file, a folder or a dataset
        print(document[:60])

A document is a str or, where a row holds token ids, an array of them. Every reader is a generator that holds
one document at a time (of Parquet, 100 rows). What cannot be read raises a UserError that names the place.
"""
import ast
import codecs
import functools
import gc
import gzip
import importlib
import io
import json
import os
import re
import sysconfig
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from nanomaml.config import UserError, one_line, require
from nanomaml.tokenizer import SPECIAL


def package(name):
    """A module that not every installation has, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


zstd = package("compression.zstd") or package("backports.zstd")  # the first from Python 3.14 on
SUFFIX = re.compile(r"\.(?:(txt|md|jsonl?)(?:\.(?:gz|zst))?|parquet)$", re.IGNORECASE)
READ = ".txt, .md, .json, .jsonl (each also .gz or .zst) and .parquet"
# Files beside rows that hold none: metadata of the library datasets, and the card of a clone from the hub.
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
CARD = {"README.md", "config.json"}
UNREADABLE = (OSError, EOFError, zlib.error, *([zstd.ZstdError] if zstd else []))  # no permission, or damaged
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's begins with UTF-16's
# Text is encoded in pieces of at most so many characters: at a million blanks the regex engine gives up. They
# end before a space, which no token crosses, so their tokens are the whole text's; without a space they end
# before a letter, so that marks stay with theirs.
LONGEST = 2**16
PIECES = re.compile(r".{1,N}(?:\Z|(?<=\S)(?= ))|.{1,N}(?=\w)|.{1,N}".replace("N", str(LONGEST)), re.DOTALL)
LONGEST_LINE = 2**27  # characters of a .jsonl line; a longer one is cut, and then is not JSON


def split_list(text):
    """The names in a comma-separated list. A comma in the path of an existing file or folder is kept."""
    parts, names = text.split(","), []
    while parts:
        n = len(parts)
        while n > 1 and not os.path.exists(",".join(parts[:n])):
            n -= 1
        names.append(",".join(parts[:n]))
        parts = parts[n:]
    return [name for name in names if name.strip()]


def hub_dataset(source):
    """(name, subset, split) of NAME:SUBSET:SPLIT, of which the last two may be left out."""
    name, subset, split = (source.split(":", 2) + ["", ""])[:3]
    return name, subset, split or "train"


def find_files(source):
    """(files to read, files passed over) of a file or folder; both are empty for a dataset of the hub.

    Refuses other names, without using the network.
    """
    path = Path(source)  # whose own methods raise an OSError for a name that is too long
    if os.path.isdir(source):
        read, others, found = [], [], []
        for at, folders, names in os.walk(source, onerror=lambda error: others.append(Path(error.filename))):
            found += [Path(at, name) for name in names]
            found += [Path(at, name) for name in folders if os.path.islink(f"{at}/{name}")]
        rows = re.compile(r"\.(jsonl?(\.gz|\.zst)?|parquet)$", re.IGNORECASE)
        has_rows = any(rows.search(file.name) and file.name not in METADATA | CARD for file in found)
        passed_over = METADATA | (CARD if has_rows else set())
        for file in sorted(found):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            is_text = SUFFIX.search(file.name) and file.name not in passed_over
            (read if is_text and not hidden and file.is_file() else others).append(file)
        require(read, f"{source} holds no file to read: {READ}; links to folders are not followed, and what "
                "save_to_disk wrote must be converted with Dataset.to_parquet")
        return read, others
    if os.path.exists(source):
        require(SUFFIX.search(path.name) and path.is_file(),
                f"{path}: sources are plain files, {READ}; convert or rename it")
        return [path], []
    name, colon, _ = source.partition(":")
    is_file_name = not colon and re.search(r"\.[A-Za-z]\w*$", name)  # such as a/b.csv
    is_dataset = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not is_file_name and not os.path.exists(name)
    require(is_dataset, f"{source}: no such file or folder; datasets are USER/NAME or USER/NAME:SUBSET:SPLIT")
    return [], []


def read_documents(source, key, encoding="utf-8", n_ids=0, opened=lambda file: None):
    """The documents of a file, of a folder's files in sorted order, or of a Hugging Face dataset.

    key: the field of rows that holds the text; encoding: of text files without a byte-order mark; n_ids: ids
    in rows of token ids are below it, 0 refuses such rows; opened: called with each open file in its turn.
    """
    files, _ = find_files(str(source))
    for path in files:
        try:
            with open(path, "rb") as file:
                opened(file)
                if path.suffix.lower() == ".parquet":
                    yield from read_columns(path, key, n_ids)
                else:
                    yield from read_file(path, file, key, encoding, n_ids)
        except UNREADABLE as error:
            raise UserError(f"cannot read {path}: {error}") from None
    if not files:
        yield from read_hub(str(source), key, n_ids)


def read_file(path, file, key, encoding, n_ids):
    if path.suffix.lower() == ".gz":
        file = gzip.GzipFile(fileobj=file)
    elif path.suffix.lower() == ".zst":
        require(zstd, f"{path}: to read .zst files, pip install backports.zstd")
        file = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
    start, name = file.peek(4)[:4], codecs.lookup(encoding).name
    if marked := [codec for mark, codec in MARKS.items() if start.startswith(mark)]:
        encoding = marked[0]
    elif start and name in ("utf-16", "utf-32") or b"\0" in start and name == "utf-8":
        raise UserError(f"{path}: no byte-order mark, and {start!r} is not {name}; try --encoding=utf-16-le")
    lines = io.TextIOWrapper(file, encoding)
    has_rows = SUFFIX.search(path.name)[1].lower().startswith("json")
    try:
        # U+FEFF is a byte-order mark, also inside a file that was joined from several.
        for document in read_lines(lines, path, key, n_ids) if has_rows else read_text(lines):
            yield document.replace("\ufeff", "") if isinstance(document, str) else document
    except UnicodeDecodeError as error:
        # The decoder was given all bytes up to the file's position, and counts within the last block.
        offset = file.tell() - len(error.object) + error.start
        raise UserError(f"{path}: byte {offset:,} (0x{error.object[error.start]:02x}) is not {encoding} "
                        "text: name its encoding with --encoding=, or convert it to UTF-8") from None


def read_text(lines):
    """Two blank lines, a line <|endoftext|> or 64 K characters end a document."""
    document, size, blank_lines = [], 0, 0
    for line in iter(lambda: lines.readline(LONGEST), ""):
        is_end = line.strip() == SPECIAL[0]
        blank_lines = 0 if line.strip() else blank_lines + 1
        document.append("" if is_end else line)
        size += len(document[-1])
        if is_end or blank_lines == 2 or size > LONGEST:
            texts = ["".join(document), ""]
            if size > LONGEST and not line.endswith("\n"):  # the line goes on, perhaps a word too
                texts = PIECES.findall(texts[0])
            yield from filter(None, map(str.strip, texts[:-1]))
            document, size = texts[-1:], len(texts[-1])
    yield from filter(None, ["".join(document).strip()])


def read_lines(lines, path, key, n_ids):
    """The rows of a file with one JSON object a line."""
    for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), 1):
        where = f"{path}, line {number}"
        line = line.strip("\ufeff \t\n")
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object: {line[:60]!r}; jq -c '.[]' splits an array")
        yield row_content(row, key, where, n_ids)


def row_content(row, key, where, n_ids):
    """The document of a row: its text, or the token ids of a pretokenized row."""
    key = key if key in row or "input_ids" not in row else "input_ids"
    if key not in row:
        raise UserError(f"{where}: no {key!r} field among {', '.join(map(str, row))}; set --text_key=")
    value = row[key]
    if value is None:
        return ""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)  # half a surrogate pair, which UTF-8 cannot write
    if not isinstance(value, list):
        raise UserError(f"{where}: {key!r} is not text: {value!r:.60}")
    if n_ids == 0:
        raise UserError(f"{where}: {key!r} holds token ids: name their tokenizer, as in --tokenizer=gpt2")
    if not set(map(type, value)) <= {int} or value and not 0 <= min(value) <= max(value) < n_ids:
        wrong = next(i for i in value if type(i) is not int or not 0 <= i < n_ids)
        raise UserError(f"{where}: {key!r} holds {wrong!r:.60}, not one of the tokenizer's {n_ids:,} ids")
    return np.array(value, np.int64)


def read_columns(path, key, n_ids):
    """The rows of a Parquet file."""
    pyarrow = package("pyarrow.parquet") and package("pyarrow")
    require(pyarrow, f"{path}: to read {path.suffix} files, pip install pyarrow")
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in (key, "input_ids") if name in names][:1] or names
        for batch in file.iter_batches(batch_size=100, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row_content(row, key, f"{path}, row {number}", n_ids)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def read_hub(source, key, n_ids):
    """The rows of a dataset of the Hugging Face hub, streamed."""
    datasets = package("datasets")
    require(datasets, f"{source}: to read datasets of the Hugging Face hub, pip install datasets")
    number, (name, subset, split) = 0, hub_dataset(source)
    try:
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield row_content(row, key, f"dataset {source}, row {number}", n_ids)
    except UserError:
        raise
    except Exception as error:  # network, name, field: whatever the library raises
        raise UserError(f"dataset {source}, after row {number}: {type(error).__name__}: "
                        f"{one_line(error, 200)}") from None


@functools.lru_cache(maxsize=1)
def embedded_documents():
    """English that every installation has on disk, 8 MB: the reference of the Python language, and the
    docstrings of its standard library, NumPy and PyTorch.
    """
    import pydoc_data.topics

    def docstrings(node):
        yield ast.get_docstring(node)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings(child)

    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    skip = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
    warnings.simplefilter("ignore", SyntaxWarning)  # about odd escapes in code that is not ours
    gc.disable()  # it would walk millions of syntax nodes again and again: 3 times the time
    for folder in (sysconfig.get_paths()["stdlib"], Path(np.__file__).parent, Path(torch.__file__).parent):
        for path in sorted(Path(folder).rglob("*.py")):
            if skip.isdisjoint(path.relative_to(folder).parts):
                try:
                    text = "\n\n".join(filter(None, docstrings(ast.parse(path.read_bytes()))))
                except (SyntaxError, ValueError, OSError):  # templates, dangling links and the like
                    continue
                if len(text) > 200:
                    documents.append(text)
    gc.enable()
    return documents
