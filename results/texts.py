"""Makes the six English texts of the experiment from NLTK's corpora: NAME.train.txt and NAME.val.txt.

    python results/texts.py data/corpus    # zip files of 10 MB are downloaded to data/nltk where missing

Documents are in random order, with two blank lines between them; the first twentieth is validation text.
The folder appears whole or not at all. Brown is free for non-commercial use alone; README in each zip file
has the terms.
"""
import hashlib
import http.client
import random
import re
import sys
import urllib.request
import zipfile
from pathlib import Path

COMMIT = "5db857e6f7df11eabb5e5665836db9ec8df07e28"
URL = f"https://raw.githubusercontent.com/nltk/nltk_data/{COMMIT}/packages/corpora/"
TEXTS = {  # name: (corpus, files that are read, how the SHA-256 of train and val begins); the order counts
    "brown": ("brown", r"c[a-r]\d\d", "7f4994b5c2ffe16a"),
    "movie_reviews": ("movie_reviews", r".+\.txt", "917410def9612419"),
    "news_abc": ("abc", r".+\.txt", "14b20e6a92341aeb"),
    "state_union": ("state_union", r".+\.txt", "629df24c295e61bd"),
    "inaugural": ("inaugural", r".+\.txt", "a2c93b30f405353a"),
    "shakespeare": ("shakespeare", r".+\.xml", "0a14465f50678abd"),
}


def detokenized(words):
    """A text of words and punctuation, joined as one writes them, by rules of thumb."""
    text = re.sub(r"\s+([.,;:!?)\]}']|n't)", r"\1", " ".join(words))
    text = re.sub(r"([(\[{])\s+", r"\1", text)
    return re.sub(r"``\s*", '"', text).replace("''", '"')


def documents(name, text):
    """The documents in a file of a corpus."""
    lines = [line for line in text.split("\n") if line.strip()]
    if name == "brown":  # word/tag
        return ["\n".join(detokenized(word.rpartition("/")[0] for word in line.split()) for line in lines)]
    if name == "movie_reviews":
        return [detokenized(text.split())]
    if name == "news_abc":  # without marks where an article ends
        return ["\n".join(map(str.strip, lines[i:i + 12])) for i in range(0, len(lines), 12)]
    if name == "shakespeare":
        text = re.sub("<[^>]*>", "", text.replace("</SPEAKER>", ":"))
        return ["\n".join(line for line in text.splitlines() if line.strip()).strip()]
    return [text.strip()]


def files_of(path, pattern):
    """The files of an NLTK corpus, in order of their names; downloads the zip file where it is missing."""
    try:
        if not path.exists():
            print(f"download  {URL}{path.name}", flush=True)
            with urllib.request.urlopen(URL + path.name, timeout=20) as response:
                path.write_bytes(response.read())
        with zipfile.ZipFile(path) as file:
            members = sorted(member for member in file.namelist()
                             if re.fullmatch(pattern, member.rpartition("/")[2]))
            return [file.read(member).decode("latin-1").replace("\r\n", "\n") for member in members]
    except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
        sys.exit(f"no texts are made: {path}: {error}; get that file, whole, from {URL}{path.name}")


def main(folder):
    zips, partial = folder.with_name("nltk"), folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        sys.exit(f"{folder} exists already: remove it")
    for new in (zips, partial):
        new.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for name, (corpus, pattern, digest) in TEXTS.items():
        files = files_of(zips / f"{corpus}.zip", pattern)
        found = [document for text in files for document in documents(name, text) if len(document) > 100]
        generator.shuffle(found)
        n_val = max(1, len(found) // 20)
        train, val = ("\n\n\n".join(part).encode() for part in (found[n_val:], found[:n_val]))
        if not hashlib.sha256(train + val).hexdigest().startswith(digest):
            sys.exit(f"no texts are made: {name} would not be the experiment's; is {corpus}.zip from {URL}?")
        (partial / f"{name}.train.txt").write_bytes(train)
        (partial / f"{name}.val.txt").write_bytes(val)
        print(f"{name}: {len(found):,} documents, {len(train):,} + {len(val):,} bytes")
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
