"""Makes the six English texts of the experiment from NLTK's corpora: NAME.train.txt and NAME.val.txt.

    python results/texts.py data/corpus    # downloads 10 MB of zip files to data/corpus/nltk where missing

Documents are in random order, with two blank lines between them; the first twentieth is validation text.
Brown is free for non-commercial use alone; README in each zip file has the terms.
"""
import hashlib
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


def texts_of(path, pattern):
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
    except (OSError, zipfile.BadZipFile) as error:
        sys.exit(f"no texts are made: {path}: {error}; get that file, whole, from {URL}{path.name}")


def main(folder):
    """Writes all texts or none; ends with an error if they are not the experiment's, byte for byte."""
    (folder / "nltk").mkdir(parents=True, exist_ok=True)
    generator, result, wrong = random.Random(0), {}, []
    for name, (corpus, pattern, digest) in TEXTS.items():
        texts = texts_of(folder / "nltk" / f"{corpus}.zip", pattern)
        found = [document for text in texts for document in documents(name, text) if len(document) > 100]
        generator.shuffle(found)
        n_val = max(1, len(found) // 20)
        train, val = ("\n\n\n".join(part).encode() for part in (found[n_val:], found[:n_val]))
        result |= {f"{name}.train.txt": train, f"{name}.val.txt": val}
        if not hashlib.sha256(train + val).hexdigest().startswith(digest):
            wrong.append(name)
        print(f"{name}: {len(found):,} documents, {len(train):,} + {len(val):,} bytes")
    for name, content in result.items():
        (folder / name).write_bytes(content)
    if wrong:
        sys.exit(f"not the texts of the experiment, so its numbers will differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
