"""Treebanks of tagged words: Universal NER's by name, downloaded where missing, and files in CoNLL's formats.

    treebanks.load("da_ddt,en_ewt:dev", "train", "data/uner")    # {name: [(words, tags), ...]}

Imports nothing of the top level, and no torch.
"""
import difflib
import http.client
import itertools
import re
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

from nanomaml import files
from nanomaml.config import UserError, one_line, require

TYPES = ("PER", "ORG", "LOC")  # of Universal NER; its fourth, OTH, does not count

SERVER = "https://raw.githubusercontent.com/UniversalNER"
REPOSITORIES = {  # treebank: its repository and branch, and the file where it is not divided into splits
    "ceb_gja": "Cebuano-GJA/master", "da_ddt": "Danish-DDT/main", "de_pud": "German-PUD/master",
    "en_ewt": "English-EWT/master", "en_pud": "English-PUD/master", "hr_set": "Croatian-SET/main",
    "nno_norne": "Norwegian-NDT/master", "nob_norne": "Norwegian-NDT/master",
    "pt_bosque": "Portuguese-Bosque/master", "pt_pud": "Portuguese-PUD/master",
    "ro_legalnero": "Romanian-LegalNERo/master/ro_legalnero.iob2", "ru_pud": "Russian-PUD/master",
    "sk_snk": "Slovak-SNK/master", "sr_set": "Serbian-SET/main", "sv_pud": "Swedish-PUD/master",
    "sv_talbanken": "Swedish-Talbanken/master", "tl_trg": "Tagalog-TRG/master",
    "tl_ugnayan": "Tagalog-Ugnayan/master", "zh_gsd": "Chinese-GSD/master",
    "zh_gsdsimp": "Chinese-GSDSIMP/master", "zh_pud": "Chinese-PUD/master",
}
TRAINABLE = ("da_ddt", "en_ewt", "hr_set", "nno_norne", "nob_norne", "pt_bosque", "sk_snk", "sr_set",
             "sv_talbanken", "zh_gsd", "zh_gsdsimp")  # have train and dev splits; the others test only
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "testa": "dev",
          "test": "test", "testb": "test"}  # a split in a file's name: train, dev or test
NO_WORD = r"\d+[-.]\d+"  # the id of a row that is not a word of its own
TAG = "O|[BI]-.+"


def counts_up(ids):
    """Do these texts count up by one, except for ranges (1-2) and empty nodes (8.1) of CoNLL-U?"""
    ids = [text for text in ids if not re.fullmatch(NO_WORD, text)]
    numbers = [int(text) for text in ids if re.fullmatch(r"\d{1,9}", text)]
    return len(ids) == len(numbers) > 0 and numbers == [numbers[0] + i for i in range(len(numbers))]


def find_ids(path, rows):
    """Whether the first column of rows, [] between sentences, holds ids: it counts up in nearly all."""
    groups = [list(group) for is_row, group in itertools.groupby(rows, lambda row: len(row) > 2) if is_row]
    counted = [counts_up([columns[0] for columns in group]) for group in groups]
    share = sum(counted) / max(len(counted), 1)
    first, second = groups[0][0][:2] if groups else ("", "")
    require(not 0.1 < share < 0.9, f"{path}: is {first!r} an id before the word {second!r}, or a word? The "
            f"first column counts up in {sum(counted)} of {len(counted)} sentences")
    return share > 0.5


def as_tag(text):
    return "O" if text.strip() in ("B-O", "I-O", "-") else text.strip()


def read_treebank(path, types=None, content=None, encoding="utf-8"):
    """The sentences of a file: pairs (words, tags) of equally long lists, tags O, B-TYPE or I-TYPE.

    Rows are id, word, tag and more, as in Universal NER, if the first column counts up in the sentences and
    there are three or more; the tag may be last instead. Otherwise, as in CoNLL's files, they are a word,
    perhaps more, and last its tag. Tabs separate them or, if the first row has none, blanks. B-O and I-O,
    slips in published files, and the - of Norwegian ones read as O. types: those that may occur; None: any.
    content: the file's bytes, if already read. UserError for a file without sentences and, with its number,
    for a line that is malformed or has another type.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        text = content.decode(encoding).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: byte {error.start:,} (0x{content[error.start]:02x}) is not "
                        f"{encoding} text: name its encoding, such as --encoding=latin-1") from None
    # Not splitlines(): it also splits at characters that occur inside words. The "" ends the last sentence.
    lines = [line.rstrip("\r\t ") for line in [*text.split("\n"), ""]]
    first = next((line for line in lines if line and not line.startswith(("#", "-DOCSTART-"))), "")
    separator = "\t" if "\t" in first else " +"
    n_columns = len(re.split(separator, first))
    rows = [re.split(separator, line) if line and not line.startswith("-DOCSTART-") else []
            for line in lines if not line.startswith("#")]
    has_ids, tagged = find_ids(path, rows), [columns for columns in rows if len(columns) > 2]
    is_third = sum(bool(re.fullmatch(TAG, as_tag(columns[2]))) for columns in tagged) > len(tagged) / 2

    sentences, words, tags = [], [], []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("-DOCSTART-"):
            if words:
                sentences.append((words, tags))
                words, tags = [], []
            continue
        columns = re.split(separator, line)
        if has_ids and re.fullmatch(NO_WORD, columns[0]):
            continue
        word = columns[1] if has_ids and len(columns) > 2 else columns[0]
        tag = as_tag(columns[2] if has_ids and is_third and len(columns) > 2 else columns[-1])
        is_row = word and len(columns) > (2 if has_ids else 1) and re.fullmatch(TAG, tag)
        # Where rows have no ids, # may also begin a word.
        if line.startswith("#") and (has_ids or not is_row or len(columns) != n_columns):
            continue
        if not is_row:
            row = "id, word and tag" if has_ids else "a word and, last, its tag"
            raise UserError(f"{path}, line {number}: expected {row} (O, B-TYPE or I-TYPE), got {line[:99]!r}")
        if tag != "O" and types is not None and tag[2:] not in types:
            raise UserError(f"{path}, line {number}: {tag} is not one of the types {', '.join(types)}")
        words.append(word)
        tags.append(tag)
    require(sentences, f"{path} has no sentences")
    words, tags = (set(itertools.chain.from_iterable(column)) for column in zip(*sentences))
    same = [len({*words}) == 1 for words, _ in sentences if len(words) > 1]
    for is_so, what in ((tags == {"O"}, "no entity"), (all(map(str.isdecimal, words)), "numbers as words"),
                        (2 * sum(same) > len(same), "sentences of one word over and over")):
        if is_so:
            print(f"warning: {path} holds {what}", file=sys.stderr, flush=True)
    return sentences


def keep_types(sentences, types):
    """The sentences with tags of other types than `types` turned into O."""
    return [(words, [tag if tag[2:] in types else "O" for tag in tags]) for words, tags in sentences]


def read_iob2(path):
    """The sentences of a treebank of Universal NER, with its fourth type, OTH, read as O."""
    return keep_types(read_treebank(path, (*TYPES, "OTH")), TYPES)


def local_files(folder):
    """{(treebank, split): [path, ...]} of what `folder` and the folders in it hold.

    Universal NER's are <treebank>-ud-<split>.iob2. Others are <name>-<split>, <name>.<split>, <name>_<split>
    or, named after their folder, <split>, and end in .iob2, .conll, .bio, .iob, .tsv, .txt or nothing.
    """
    found = defaultdict(list)
    for path in sorted([*Path(folder).glob("*"), *Path(folder).glob("*/*")]):
        form = rf"(?:(.+?)(?:-ud-|[-._]))?({'|'.join(SPLITS)})(?:\.(?:iob2|conll|bio|iob|tsv|txt))?"
        if (match := re.fullmatch(form, path.name)) and path.is_file():
            found[match[1] or path.parent.resolve().name, SPLITS[match[2]]].append(path)
    return found


def load(names, split, folder, types=None, encoding="utf-8"):
    """{name: sentences} of `names`, "all" or treebanks such as "da_ddt,en_ewt:dev", downloaded where missing.

    split: "train" or "test", for names without one of their own; types: as in `read_treebank`. With all, a
    note names what cannot be fetched or read; it is an error only if nothing is left.
    """
    is_all = names == "all"
    names = all_names(split, folder) if is_all else list(filter(None, map(str.strip, names.split(","))))
    require(names, f"no treebank named: give --{split}=all or names like da_ddt,en_ewt")
    found, errors, offline = {}, {}, None
    for name in names:
        try:
            path = find_treebank(name, split, folder, offline)
            found[name] = read_treebank(path, types, encoding=encoding)
        except UserError as error:
            if not is_all:
                raise
            errors[name] = error
            offline = error if isinstance(error, Offline) else offline
    if not found:
        raise next(iter(errors.values()))
    if errors:
        reasons = one_line("; ".join(dict.fromkeys(map(str, errors.values()))), 500)
        print(f"note      --{split}=all leaves out {', '.join(errors)}: {reasons}", flush=True)
    return found


def all_names(split, folder):
    """The treebanks in `folder` with this split and, unless it only holds other data, the published ones."""
    local = local_files(folder)
    paths = sum(local.values(), [])
    names = {treebank for treebank, of_split in local if of_split == split}
    if not paths or any("-ud-" in path.name for path in paths):
        names.update(REPOSITORIES if split == "test" else TRAINABLE)
    require(names, f"{folder} has no {split} split: it holds {', '.join(map(str, paths))}")
    return sorted(names)


def treebank_and_split(name, split):
    """("en_ewt", "dev") of "en_ewt:dev"; `split` applies to a name without one."""
    treebank, colon, own_split = name.partition(":")
    return treebank, SPLITS.get(own_split, own_split) if colon else split


def has_dev(treebank, folder):
    return treebank in TRAINABLE or (treebank, "dev") in local_files(folder)


def find_treebank(name, split, folder, offline=None):
    """The path of a treebank's split in `folder`, downloaded if missing; offline: an earlier error."""
    treebank, split = treebank_and_split(name, split)
    local = local_files(folder)
    if paths := local.get((treebank, split)):
        require(len(paths) < 2, f"{' and '.join(map(str, paths))} are both {treebank}:{split}")
        return paths[0]
    path, source = Path(folder, f"{treebank}-ud-{split}.iob2"), REPOSITORIES.get(treebank)
    if source is None:
        known = sorted({*REPOSITORIES, *(name for name, _ in local)})
        near = ", ".join(difflib.get_close_matches(treebank, known, n=1) or known)
        raise UserError(f"{treebank!r} is neither in {folder} nor of Universal NER: did you mean {near}?")
    require(split == "test" or split in ("train", "dev") and treebank in TRAINABLE,
            f"{treebank} has no {split} split: there is test and, of {', '.join(TRAINABLE)}, train and dev")
    if offline:
        raise offline
    download(f"{SERVER}/UNER_{source if source.endswith('.iob2') else f'{source}/{path.name}'}", path)
    return path


class Offline(UserError):
    """A server was not reached, so other downloads will fail as well."""


def download(url, path):
    """Saves the treebank at `url` as `path`, complete or not at all. Raises UserError or Offline."""
    print(f"download  {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        read_treebank("the file", content=content)  # UserError, for instance of a login page
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, content)
    except (OSError, http.client.HTTPException, UserError) as error:  # urllib's errors are OSErrors
        kind = Offline if type(error) in (urllib.error.URLError, TimeoutError) else UserError  # no HTTPError
        raise kind(f"{path} is missing and the download failed ({error}): fetch {url}") from None
