"""What people have, as documents: text files, JSON lines, Parquet, Hugging Face datasets.

    for document in sources.read_documents("corpus/", "text"):         # a file, a folder or a dataset
        print(document[:60])

A document is a str or, where a row holds token ids, an array of them. Every reader is a generator that holds
one document at a time (of a Parquet file 100). What cannot be read raises a UserError that names the place.
"""
import ast
import codecs
import functools
import gc
import gzip
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

from config import UserError
from data import SPECIAL

SUFFIX = re.compile(r"\.(?:(txt|md|jsonl?)(?:\.(?:gz|zst))?|parquet)$", re.IGNORECASE)
READ = ".txt, .md, .json, .jsonl (each also .gz or .zst) and .parquet"
# What ends so is the name of a file: where it does not exist, no dataset of that name is looked for.
OTHER_FILE = re.compile(r"\.(?:7z|arrow|bin|bz2|conllu?|csv|db|docx?|epub|feather|gz|h5|html?|ipynb|log|"
                        r"np[yz]|odt|pdf|pkl|pt|py|rar|rst|rtf|safetensors|sqlite|tar|tex|text|tgz|toml|tsv|warc|"
                        r"xlsx?|xml|xz|ya?ml|zip|zst)$", re.IGNORECASE)
# Formats that datasets.load_dataset would take for a name, to then look for files beside the command.
BUILDERS = set("arrow audiofolder conll csv eval fasta fastq genbank harbor hdf5 iceberg imagefolder json "
               "lance meshfolder mmcif niftifolder pandas parquet pdb pdffolder sql text tsfile videofolder "
               "vortex webdataset xml".split())
# Files of datasets' own, which hold no rows.
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
# Text is encoded in pieces of at most so many characters: at a million blanks the regex engine gives up. They
# are cut before a space, where no tokenizer's token goes on, so the tokens are those of the whole text; where
# there is none, before a letter, which keeps marks with theirs.
LONGEST = 2**16
PIECES = re.compile(r".{1,N}(?:\Z|(?<=\S)(?= ))|.{1,N}(?=\w)|.{1,N}".replace("N", str(LONGEST)), re.DOTALL)
LONGEST_LINE = 2**27  # characters of a .jsonl line


# ---- names ----


def split_list(text):
    """The names in a comma-separated list. A comma in the path of a file or folder that is there stays."""
    parts, names = text.split(","), []
    while parts:
        longest_first = [",".join(parts[:n]) for n in range(len(parts), 1, -1)]
        name = next((name for name in longest_first if os.path.exists(name) or saved_dataset(name)), parts[0])
        names.append(name)
        parts = parts[name.count(",") + 1:]
    return [name for name in names if name.strip()]


def saved_dataset(source):
    """(folder, split) of FOLDER, FOLDER:SPLIT or FOLDER::SPLIT that datasets' save_to_disk wrote, else None.

    The split is "" where none is named.
    """
    folder, split = source, ""
    if not os.path.exists(source) and ":" in source:
        folder, split = source.rsplit(":", 1)
        folder = folder.removesuffix(":")
    for names in (("dataset_info.json", "state.json"), ("dataset_dict.json",)):
        if all(os.path.exists(f"{folder}/{name}") for name in names):
            return folder, split
    return None


def dataset_identity(source):
    """The same for all ways to name a split: its folder, or NAME:SUBSET:SPLIT on the hub."""
    if saved := saved_dataset(source):
        folder, split = saved
        has_splits = os.path.exists(f"{folder}/dataset_dict.json")
        return os.path.realpath(f"{folder}/{split or 'train'}" if has_splits else folder)
    name, subset, split = (source.split(":", 2) + ["", ""])[:3]
    return f"{name}:{subset}:{split or 'train'}"


def dataset_files(source):
    """The files of a dataset that save_to_disk wrote; none of one on the hub."""
    saved = saved_dataset(source)
    return sorted(path for path in Path(saved[0]).rglob("*") if path.is_file()) if saved else []


def find_files(source):
    """(files to read, files passed over) of a file or folder; both are empty for a dataset.

    Refuses what is none of them, without a look at the network.
    """
    if saved_dataset(source):
        return [], []
    path = Path(source)  # whose own methods raise an OSError for a name that is too long
    if os.path.isdir(source):
        read, others = [], []
        for file in sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            is_text = SUFFIX.search(file.name) and file.name not in METADATA
            (read if is_text and not hidden and file.is_file() else others).append(file)
        if not read:
            links = [f"; {file} is a link to a folder: name that itself" for file in others if file.is_dir()]
            raise UserError(f"{source} holds no file to read: {READ}{''.join(links[:1])}")
        return read, others
    if os.path.exists(source):
        if not SUFFIX.search(path.name):
            raise UserError(f"{path}: sources are {READ} files; convert or rename it")
        return [path], []
    name, _, rest = source.partition(":")
    if os.path.exists(name):
        raise UserError(f"{source}: {name} is no dataset that save_to_disk wrote; leave out :{rest}")
    is_file_name = SUFFIX.search(source) or OTHER_FILE.search(source) or "\\" in source
    if is_file_name or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"{source}: no such file or folder")
    if name.lower() in BUILDERS:
        raise UserError(f"{source}: {name} is a file format, no dataset; name the files or their folder")
    if "/" not in name and not rest:  # rather a folder that is misspelt
        raise UserError(f"{source}: no such file or folder; the Hugging Face dataset of that name is "
                        f"{source}::train, or {source}:SUBSET")
    return [], []


# ---- documents ----


def read_documents(source, key, encoding="utf-8", n_ids=0, progress=None):
    """The documents of a file, of a folder's files in sorted order, or of a Hugging Face dataset.

    key: the field of rows that holds the text; encoding: of text files without a byte-order mark; n_ids: rows
    of token ids may hold those below it, 0 refuses such rows. `progress` is told the bytes of the files that
    are done (`progress.done`) and the one that is being read (`progress.file`).
    """
    files, _ = find_files(str(source))
    for path in files:
        try:
            if path.suffix.lower() == ".parquet":
                yield from read_parquet(path, key, n_ids)
            else:
                yield from read_file(path, key, encoding, n_ids, progress)
        except (OSError, EOFError, zlib.error) as error:  # no right to read it, or damaged gzip
            raise UserError(f"cannot read {path}: {error}") from None
        if progress is not None:
            progress.done, progress.file = progress.done + path.stat().st_size, None
    if not files:
        yield from read_dataset(str(source), key, n_ids)


def read_file(path, key, encoding, n_ids, progress):
    with open(path, "rb") as file:
        if progress is not None:
            progress.file = file
        content = file
        if path.suffix.lower() == ".gz":
            content = gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            content = io.BufferedReader(Zstandard(file, path))
        start = content.peek(4)
        if start.startswith(codecs.BOM_UTF8):
            encoding = "utf-8"
        elif start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            encoding = "utf-32"
        elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        elif b"\0" in start[:4] and codecs.lookup(encoding).name == "utf-8":
            raise UserError(f"{path}: starts with {start[:4]!r}, which is no text; if it is UTF-16, give "
                            "--encoding=utf-16-le or utf-16-be")
        lines = io.TextIOWrapper(content, encoding)
        has_rows = SUFFIX.search(path.name)[1].lower().startswith("json")
        try:
            # U+FEFF is a byte-order mark, also within a file that several were joined to.
            for document in read_lines(lines, path, key, n_ids) if has_rows else read_text(lines):
                yield document.replace("\ufeff", "") if isinstance(document, str) else document
        except UnicodeDecodeError as error:
            # The decoder was given all bytes up to where the file stands, and counts in the last of them.
            offset = content.tell() - len(error.object) + error.start
            raise UserError(f"{path}: byte {offset:,} (0x{error.object[error.start]:02x}) is no {encoding} "
                            "text: name its encoding with --encoding=, or convert it to UTF-8") from None
        except UnicodeError:  # so Python's utf-16 and utf-32 refuse a file without a mark
            encoding = codecs.lookup(encoding).name
            raise UserError(f"{path}: no byte-order mark, which {encoding} asks for: give "
                            f"--encoding={encoding}-le, {encoding}-be or whatever it is in") from None


class Zstandard(io.RawIOBase):
    """The content of a .zst file. zstandard's own reader would take one that is cut short for a whole one."""

    def __init__(self, file, path):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: to read .zst files, pip install zstandard") from None
        self.new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.file, self.frame, self.error = file, None, zstandard.ZstdError
        self.compressed, self.output, self.position = b"", b"", 0

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.output:
            self.compressed = self.compressed or self.file.read(2**17)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.output = self.frame.decompress(self.compressed)
            except self.error as error:
                raise OSError(str(error)) from None
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.output))
        buffer[:n], self.output = self.output[:n], self.output[n:]
        self.position += n
        return n

    def tell(self):
        return self.position


def read_text(lines):
    """Two blank lines, a line <|endoftext|> or 64 K characters end a document."""
    document, size, blank_lines = [], 0, 0
    for line in iter(lambda: lines.readline(LONGEST), ""):
        is_end = line.strip() == SPECIAL[0]
        blank_lines = 0 if line.strip() else blank_lines + 1
        if not is_end:
            document.append(line)
            size += len(line)
        if is_end or blank_lines == 2 or size > LONGEST:
            text, document = "".join(document), []
            if size > LONGEST and not line.endswith("\n"):  # nor does a word end here
                *texts, rest = PIECES.findall(text)
                yield from (text.strip() for text in texts)
                document = [rest]
            else:
                yield text.strip()
            size = sum(map(len, document))
    yield "".join(document).strip()


def read_lines(lines, path, key, n_ids):
    """The rows of a file with one JSON object a line."""
    for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), 1):
        where = f"{path}, line {number}"
        if len(line) == LONGEST_LINE:
            raise UserError(f"{where}: over {LONGEST_LINE:,} characters; one JSON object a line is read")
        line = line.strip("\ufeff \t\n")
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object with a {key!r} field: {line[:60]!r}; each line is to "
                            "hold one (jq -c '.[]' makes such lines of an array)")
        yield row_content(row, key, where, n_ids)


def row_content(row, key, where, n_ids):
    """The document of a row: its text, or the token ids of a pretokenized row."""
    if key not in row and "input_ids" not in row:
        raise UserError(f"{where}: no {key!r} field among {', '.join(map(str, row)) or 'none'}: name the one "
                        "that holds the text with --text_key=")
    key = key if key in row else "input_ids"
    value = row[key]
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)  # half a surrogate pair, which UTF-8 cannot write
    if not isinstance(value, list):
        raise UserError(f"{where}: {key!r} is not text: {value!r:.60}")
    if not set(map(type, value)) <= {int} or min(value, default=0) < 0:
        wrong = next(i for i in value if type(i) is not int or i < 0)
        raise UserError(f"{where}: {key!r} is neither text nor token ids: it holds {wrong!r:.60}")
    if n_ids == 0:
        raise UserError(f"{where}: {key!r} holds token ids: name the tokenizer they are of, --tokenizer=gpt2 "
                        "or a folder with a tokenizer.json")
    if max(value, default=0) >= n_ids:
        raise UserError(f"{where}: token id {max(value)} is outside the tokenizer's {n_ids:,} ids: name the "
                        "one they are of with --tokenizer=")
    return np.array(value, np.int64)


def read_parquet(path, key, n_ids):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: to read .parquet files, pip install pyarrow") from None
    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        wanted = [name for name in (key, "input_ids") if name in file.schema_arrow.names][:1]
        for batch in file.iter_batches(batch_size=100, columns=wanted or None):
            for row in batch.to_pylist():
                number += 1
                yield row_content(row, key, f"{path}, row {number}", n_ids)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def read_dataset(source, key, n_ids):
    """The rows of a Hugging Face dataset: NAME:SUBSET:SPLIT, streamed from the hub, or a folder of it."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is not a file or folder of text; if it is a Hugging Face dataset, "
                        "pip install datasets first") from None
    number, saved = 0, saved_dataset(source)
    try:
        if saved:
            rows = saved_split(datasets.load_from_disk(saved[0]), *saved)
        else:
            name, subset, split = (source.split(":", 2) + ["", ""])[:3]
            rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield row_content(row, key, f"dataset {source}, row {number}", n_ids)
    except UserError:
        raise
    except Exception as error:  # network, name, field: whatever the library meets
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"dataset {source}, after row {number}: {type(error).__name__}: {reason}") from None


def saved_split(rows, folder, split):
    """The rows of one split of what load_from_disk gave: the Dataset itself, or a dict of them."""
    if isinstance(rows, dict):
        if (split or "train") not in rows:
            raise UserError(f"{folder} has no split {split or 'train'}: it has {', '.join(rows)}; name one "
                            f"as {folder}::{next(iter(rows), 'SPLIT')}")
        rows = rows[split or "train"]
    elif split and str(rows.split) != split:
        raise UserError(f"{folder} holds one split ({rows.split or 'without a name'}), not {split}: leave "
                        f"out :{split}")
    return rows.with_format(None)  # lists, not the tensors that it may have been saved with


# ---- the embedded corpus ----


@functools.lru_cache(maxsize=1)
def embedded_documents():
    """English prose that every installation has on disk, about 8 MB.

    The language reference of Python, and the docstrings of its standard library, NumPy and PyTorch.
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
    collecting = gc.isenabled()
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
    if collecting:
        gc.enable()
    return documents
