"""
Text in, batches of token ids out.

A corpus is cut into documents, a few per cent of the documents become the validation text, byte pair encoding (BPE)
is trained on the rest, and both sides are kept as flat files of 16-bit token ids, <|endoftext|> after each document.
Training reads windows of such a file at random places; which places is a pure function of (seed, step).

BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) starts from the 256 bytes and again and again makes the most
frequent pair of neighbours into a new token. Two ideas make it fast in plain Python:
- Merges never cross a piece (a word with its leading space, a number, a run of punctuation), so equal pieces are
  counted and merged once, however often they occur.
- A piece in the making is a str whose characters are token ids. Merging a pair is then str.replace, putting a
  document together is str.join, and writing it as 16-bit ids is encoding it as UTF-16.

    python data.py stdlib                      # the running Python's own library: on every machine, no network
    python data.py my.txt --vocab-size 1000    # or a folder; each file is a document
    python data.py tinystories --tokens 4e7    # from the Hugging Face hub, as much as 40 M tokens need

prepares a corpus under data/ and shows what a model will see. tokenizer.json is the format of the Hugging Face
`tokenizers` library, both ways, with the same ids; train.bin and val.bin are little-endian uint16.
"""

import argparse, hashlib, json, os, re, shutil, signal, stat, sys, sysconfig, time, unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from http.client import HTTPException
from mmap import ACCESS_READ, mmap
from multiprocessing import get_context, parent_process
from operator import add
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two processes that start together may do the same work twice
    fcntl = None

EOT = "<|endoftext|>"
SPAN = 4 << 20  # bytes a worker reads at a time: what bounds its memory, whatever the size of the corpus
LONGEST = 4 * SPAN  # a document may be so long without being cut
FORMAT = 1  # raise it when prepared files change their meaning: old ones are then made anew


class DataError(ValueError):
    """Bad input, told in one line: what is wrong, with which value, and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: text to ids and back

# GPT-2's stand-ins for the 256 bytes, the alphabet of a tokenizer.json: printable Latin-1 characters stand for
# themselves, the other bytes for the characters from U+0100 on.
BYTE_TO_CHAR = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


@lru_cache
def piece_pattern(ascii, digits=""):
    r"""GPT-2's pattern for pieces: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re has no \p, but its \w is exactly L, N and "_", and its \d is Nd, so only No and Nl need a list; its \s
    takes U+001C..U+001F for spaces, which Unicode does not. Long classes are slow, so ASCII stands first in them, and
    text that is ASCII alone (most of English and code) has a pattern of its own, which is over twice as fast.
    digits: "one" or "run" sets single digits or runs of them apart first, as the pre-tokenizer Digits does.
    """
    other = "".join(chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) in ("No", "Nl"))  # none lie above
    space = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    letter, number = rf"(?:[A-Za-z]+|[^\W\d_{other}])", rf"[\d{other}]"
    symbol = rf"(?:[!-/:-@\[-`{{-~]|[^\w{space}])"
    if ascii:
        other, space, letter, number, symbol = "", "\t-\r ", "[A-Za-z]", "[0-9]", "[^A-Za-z0-9\t-\r ]"
    numbers = {"": f" ?{number}+", "one": number, "run": f"{number}+"}[digits]
    end = rf"{space}\d{other}" if digits else space  # digits set apart end the text before them, spaces and all
    return re.compile(rf"'(?:[stmd]|re|ve|ll)| ?{letter}+|{numbers}| ?{symbol}+|[{space}]+(?![^{end}])|[{space}]+")


class Tokenizer:
    """Byte-level BPE from the content of a tokenizer.json. Inside, the token i is the character chr(i)."""

    def __init__(self, spec):
        self.spec, model, added = spec, spec["model"], spec.get("added_tokens") or []
        steps = spec["pre_tokenizer"].get("pretokenizers") or [spec["pre_tokenizer"]]
        last, kinds = steps[-1], [step["type"] for step in steps]
        self.prefix = last.get("add_prefix_space")
        self.digits = "" if kinds[0] != "Digits" else "one" if steps[0]["individual_digits"] else "run"
        self.special = {token["content"]: token["id"] for token in added}
        vocab = {**model["vocab"], **self.special}
        self.vocab_size, self.eot = max(vocab.values()) + 1, vocab.get(EOT)
        self.symbols = {b: chr(vocab[c]) if c in vocab else None for b, c in BYTE_TO_CHAR.items()}  # None: left out
        gaps = None in self.symbols.values()
        odd = [key for key in model if model[key] and key not in ("type", "vocab", "merges", "fuse_unk", "unk_token")]
        odd += [key for token in added for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        odd += ["normalizer"] * bool(spec.get("normalizer")) + ["unk_token"] * bool(model.get("unk_token") and gaps)
        if odd or kinds not in (["ByteLevel"], ["Digits", "ByteLevel"]) or not last.get("use_regex", True) \
                or self.digits and self.prefix or model.get("type", "BPE") != "BPE" or self.vocab_size > 65536:
            raise DataError("only byte-level BPE of at most 65,536 tokens, after Digits or nothing, is supported, not "
                            f"{model.get('type', 'BPE')} of {self.vocab_size:,} after {', '.join(kinds + odd)}")
        self.bytes = {i: token.encode() if token in self.special else bytes(CHAR_TO_BYTE[c] for c in token)
                      for token, i in vocab.items()}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self.merges = [(chr(vocab[a]) + chr(vocab[b]), chr(vocab[a + b])) for a, b in merges]
        self.ranks = {pair: rank for rank, (pair, _) in enumerate(self.merges)}
        self.split = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")
        self.tokens = lru_cache(1 << 18)(self.merge)  # bounded: a huge corpus has no end of rare pieces

    @classmethod
    def load(cls, path):
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise DataError(f"{path} cannot be used as a tokenizer.json: {e or type(e).__name__}") from None

    def save(self, path):
        Path(path).write_text(json.dumps(self.spec, ensure_ascii=False, indent=1), encoding="utf-8")

    def merge(self, piece):
        """One piece: its bytes, in which the pair that was learnt first is merged until there is none left."""
        word, rank, never = piece.encode().decode("latin-1").translate(self.symbols), self.ranks.get, 1 << 30
        while len(word) > 100 and (ranks := [self.ranks[p] for p in map(add, word, word[1:]) if p in self.ranks]):
            word = word.replace(*self.merges[min(ranks)])  # a long one: every occurrence at once, or it would take ages
        ranks = [rank(pair, never) for pair in map(add, word, word[1:])]
        word = list(word)
        while ranks and (best := min(ranks)) < never:
            i = ranks.index(best)
            word[i:i + 2] = self.merges[best][1]
            del ranks[i]
            if i < len(ranks):
                ranks[i] = rank(word[i] + word[i + 1], never)
            if i > 0:
                ranks[i - 1] = rank(word[i - 1] + word[i], never)
        return "".join(word)

    def encode_str(self, text):
        """The ids of a text as the characters of a str."""
        out, at, find = [], 0, piece_pattern(text.isascii(), self.digits).findall
        for match in [*self.split.finditer(text), None]:
            part = text[at:match.start() if match else None]
            out.extend(map(self.tokens, find(" " + part if self.prefix and part and part[0] != " " else part)))
            if match:
                out.append(chr(self.special[match[0]]))
                at = match.end()
        return "".join(out)

    def encode(self, text):
        return list(map(ord, self.encode_str(text)))

    def decode(self, ids):
        return b"".join(self.bytes[int(i)] for i in ids).decode("utf-8", errors="replace")


def train_bpe(pieces, vocab_size):
    """Learn merges from a Counter of pieces, until there are vocab_size tokens or no pair occurs twice.

    The most frequent pair goes first; of equals the one with the lower ids. Pair counts are kept up to date and an
    index tells which words may hold a pair, so that a merge costs only what it changes. The ids are the same that the
    trainer of the `tokenizers` library gives with this special token and the alphabet of bytes.
    """
    tokens = [EOT, *sorted(CHAR_TO_BYTE)]
    ids, merges = {token: i for i, token in enumerate(tokens)}, []
    symbols = {byte: chr(ids[char]) for byte, char in BYTE_TO_CHAR.items()}
    words = [piece.encode().decode("latin-1").translate(symbols) for piece in pieces]
    frequency = list(pieces.values())
    counts, where = defaultdict(int), defaultdict(list)
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            counts[pair] += frequency[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    with tqdm(total=vocab_size - len(tokens), desc="merging  ", unit=" tokens", disable=None) as bar:
        while heap and len(tokens) < vocab_size:
            count, pair = heappop(heap)
            if -count != counts[pair]:  # the count has fallen since this entry was made: queue the right one
                heappush(heap, (-counts[pair], pair))
                continue
            if -count < 2:
                break
            a, b = (tokens[ord(symbol)] for symbol in pair)
            assert a + b not in ids  # the same bytes are always merged in the same order, so no token comes about twice
            new, fresh = chr(len(tokens)), set()
            ids[a + b] = len(tokens)
            tokens.append(a + b)
            merges.append(f"{a} {b}")
            bar.update()
            for i in where.pop(pair):
                old, n = words[i], frequency[i]
                if pair not in old:  # an earlier merge took it, or this word was listed twice
                    continue
                words[i] = word = old.replace(pair, new)
                for p in map(add, old, old[1:]):
                    counts[p] -= n
                for p in map(add, word, word[1:]):
                    counts[p] += n
                    if new in p:
                        where[p].append(i)
                        fresh.add(p)
            for p in fresh:
                heappush(heap, (-counts[p], p))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return Tokenizer({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level,
        "added_tokens": [{"id": 0, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": ids,
                  "merges": merges}})


# ----------------------------------------------------------------------------------------------------------------------
# Downloads from the Hugging Face hub

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
ROWS = os.environ.get("HF_DATASETS_SERVER", HUB.replace("://", "://datasets-server.")).rstrip("/")
TRIES, PATIENCE = 6, 1.0  # attempts without progress before giving up; seconds to the second one, then doubled


class Again(Exception):
    """An answer that is worth another try."""


class Changed(Again):
    """It is not the file it was: what is here already must not be glued to it."""


class Redirects(HTTPRedirectHandler):
    """Sends the token to no other host, and keeps what the hub says of a file: it redirects to a storage whose own
    ETag says nothing of the content."""

    def redirect_request(self, request, body, code, message, headers, url):
        self.linked = {k.lower(): headers[k] for k in ("X-Linked-Etag", "X-Linked-Size") if k in headers} or self.linked
        new = super().redirect_request(request, body, 307 if code == 308 else code, message, headers, url)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new

    linked, http_error_308 = {}, HTTPRedirectHandler.http_error_302  # Python 3.10 does not follow 308


def get(url, **headers):
    """An open response and its headers. Proxies come from the environment."""
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    redirects = Redirects()
    response = build_opener(redirects).open(Request(url, headers={"User-Agent": "nanoLR", **headers}), timeout=30)
    return response, {key.lower(): value for key, value in response.headers.items()} | redirects.linked


def fetch_file(url, file, want, note):
    """Append what `file` lacks of the first `want` bytes (None: of all), as far as one answer brings it; yield how many
    bytes there should be in the end, after each piece."""
    have = file.tell()
    response, told = get(url, Range=f"bytes={have}-{want - 1 if want else ''}")
    with response:
        sent = told.get("content-range", "")
        size = told.get("x-linked-size") or sent.split("/")[-1] or told.get("content-length", "")
        size = int(size) if size.isdigit() else None
        etag = (told.get("x-linked-etag") or told.get("etag", "")).removeprefix("W/").strip('"')
        if note.setdefault("version", [etag, size]) != [etag, size]:
            raise Changed("it changed on the server")
        if response.status == 200:  # a server that ignores Range sends it all
            file.seek(file.truncate(0))
        elif not sent.startswith(f"bytes {have}-"):
            raise Again("it sent another part than was asked for")
        goal = min(want or sys.maxsize, size or sys.maxsize)
        while file.tell() < goal and (data := response.read(min(1 << 18, goal - file.tell()))):
            file.write(data)
            yield goal
    file.flush()
    if size and file.tell() < goal:
        raise Again(f"its answer ended at {file.tell():,} of {goal:,} bytes")
    note["whole"] = file.tell() == size if size else file.tell() < goal
    git = "x-linked-etag" not in told  # SHA-256 of what the hub keeps in its storage, git's SHA-1 of a small file
    if note["whole"] and len(etag) == (40 if git else 64) and etag != content_hash(file.name, git=git):
        raise Changed("what came does not have the hash that it gave")


def fetch_rows(url, file, want, note):
    """Append the next 100 rows of a dataset, each a document."""
    file.seek(file.truncate(note.get("bytes", 0)))
    row = note.get("row", 0)
    response, told = get(f"{url}&offset={row}&length=100")
    with response:
        try:
            page = json.loads(response.read())
            texts = [item["row"]["text"] for item in page["rows"] if "text" not in item.get("truncated_cells", ())]
        except (ValueError, KeyError, TypeError) as e:
            raise Again(f"its answer was no page of rows: {e}") from None
    if note.setdefault("version", told.get("x-revision")) != told.get("x-revision"):
        raise Changed("it changed on the server")
    file.write("".join(f"{text}\n{EOT}\n" for text in texts).encode())
    row += len(page["rows"])
    note.update(row=row, whole=not page["rows"] or row >= page.get("num_rows_total", row + 1))
    yield want


def download(path, want, fetch, url):
    """Grow `path` to at least `want` bytes (None: all there is).

    Data arrives in path.part, which gets its name when it is complete; path.json notes the version of the file, so that
    a later run can go on from there. A file without such a note was put there by hand and is taken as it is.
    """
    part, side, new = (Path(f"{path}.{suffix}") for suffix in ("part", "json", "json.new"))
    note = json.loads(side.read_text()) if side.exists() else {}
    if path.exists():
        if note and path.stat().st_size != note["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes, {note['bytes']:,} were fetched: delete it to "
                            f"fetch it again, or delete {side.name} to use it as it is")
        if not note or note["whole"]:
            return
        path.rename(part)

    def save_note():
        new.write_text(json.dumps(note))
        new.replace(side)

    part.parent.mkdir(parents=True, exist_ok=True)
    tries, furthest, answered = 0, 0, False
    with open(part, "ab") as file, tqdm(total=want, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        file.seek(0 if note else file.truncate(0), os.SEEK_END)  # without a note nobody knows which version it is of
        while not note.get("whole") and not (note and want and file.tell() >= want):
            problem, wait = "", PATIENCE * 2 ** tries
            try:
                for bar.total in fetch(url, file, want, note):
                    if not side.exists():  # from now on a killed process can be followed by one that goes on
                        save_note()
                    bar.update(file.tell() - bar.n)
            except (Again, URLError, ConnectionError, TimeoutError, HTTPException) as e:
                problem = str(getattr(e, "reason", e)) or repr(e)
                answered = answered or isinstance(e, HTTPError) or not isinstance(e, URLError)
                if isinstance(e, HTTPError):
                    problem = f"HTTP {e.code} {problem}"
                    after = e.headers.get("Retry-After", "")  # seconds or a date
                    date = parsedate_tz(after)
                    after = int(after) if after.isdigit() else mktime_tz(date) - time.time() if date else 0
                    wait = min(max(wait, after), 600)
                    tries = tries if e.code in (408, 416, 425, 429) or e.code >= 500 else TRIES  # else no use
                if isinstance(e, Changed) or getattr(e, "code", 0) == 416:  # 416: it ends before what is here
                    file.truncate(0)
                    note.clear()
            note["bytes"] = file.seek(0, os.SEEK_END)
            save_note()
            if problem:
                tries, furthest = 1 if file.tell() > furthest else tries + 1, max(furthest, file.tell())
                if tries >= TRIES or not answered:  # never an answer, so no network: not worth the wait
                    raise DataError(f"cannot fetch {path.name} from {url.split('?')[0]} ({problem}): put it at {path} "
                                    "by hand, or use --data stdlib, which needs no network")
                bar.set_postfix_str(f"{problem}, next try in {wait:.0f} s")
                time.sleep(wait)
    part.rename(path)


# ----------------------------------------------------------------------------------------------------------------------
# Corpora: where the text is


@dataclass
class Source:
    name: str  # names the prepared folder
    identity: str | None  # changes with the text; None: what was prepared stands, the text need not be here any more
    files: list  # paths of the text
    strict: bool = False  # a file that is not text is an error, in place of being skipped
    block: int = 0  # the file has no documents of its own: cut it into blocks of about so many characters
    limit: int | None = None  # only so many bytes of the file
    val_file: Path | None = None  # the validation text that comes with the corpus; otherwise documents are held out
    tokenizer: Path | None = None  # a published tokenizer, in place of training one
    downloads: tuple = ()  # what has to be fetched first: (path, bytes wanted or None, fetch_file or fetch_rows, url)


def digest(value):
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def folder_source(name, root, cache, suffix="", skip=("__pycache__",)):
    """Every file below root that ends with suffix is a document. They are known by name, size and time of change."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d[0] != "." and d not in skip and Path(folder, d).resolve() != cache]
        for path in (os.path.join(folder, name) for name in names if name[0] != "." and name.endswith(suffix)):
            if os.path.exists(path) and stat.S_ISREG((info := os.stat(path)).st_mode):
                found.append((path, info.st_size, info.st_mtime_ns))
    found.sort()
    return Source(name, digest(found), [path for path, _, _ in found])


def path_source(path, cache):
    path = os.path.abspath(path)
    name = f"{os.path.basename(path)}-{digest(path)[:6]}"
    if os.path.isdir(path):
        return folder_source(name, path, cache)
    info = os.stat(path)
    with open(path, "rb") as file:
        own_documents = EOT.encode() in file.read(LONGEST)
    if not info.st_size:
        raise DataError(f"{path} is empty: a corpus needs some text")
    # Blocks, so that a plain text has a validation side too: neighbours of training text, but never the same text.
    block = 0 if own_documents else min(max(info.st_size // 64, 128), 8192)
    return Source(name, digest((path, info.st_size, info.st_mtime_ns)), [path], strict=True, block=block)


def stdlib(cache, n_tokens, vocab_size):
    """The .py files of the running Python's standard library, without its tests and what was installed with pip."""
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    return folder_source("stdlib", sysconfig.get_paths()["stdlib"], cache, ".py", skip)


def two_digits(x):
    return int(float(f"{x:.1e}"))  # runs of nearly the same budget share a prepared folder


def tinystories(cache, n_tokens, vocab_size):
    """Short stories in the words of small children (Eldan & Li 2023), the version that GPT-4 wrote: 2.2 GB."""
    mb = n_tokens and two_digits(n_tokens * 4.2 / 2**20 + 1)  # it has 4.1 bytes a token at 10,000 entries
    train, valid = (cache / "downloads" / f"TinyStoriesV2-GPT4-{side}.txt" for side in ("train", "valid"))
    url = f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/"
    downloads = [(valid, None, fetch_file, url + valid.name), (train, mb and mb << 20, fetch_file, url + train.name)]
    return Source(f"tinystories-{mb}MB" if mb else "tinystories", None, [train], strict=True, limit=mb and mb << 20,
                  val_file=valid, downloads=downloads)


def cosmopedia(cache, n_tokens, vocab_size):
    """Synthetic textbooks and posts (Ben Allal et al. 2024); with the published tokenizer if its size is asked for."""
    mb = two_digits((n_tokens or 500_000) * 5 / 2**20 + 1)  # nearly 5 bytes a token, and some text for validation
    text, tokenizer = cache / "downloads/cosmopedia-v2.txt", cache / "downloads/cosmo2-tokenizer.json"
    rows = f"{ROWS}/rows?dataset=HuggingFaceTB%2Fsmollm-corpus&config=cosmopedia-v2&split=train"
    published = (tokenizer, None, fetch_file, f"{HUB}/HuggingFaceTB/cosmo2-tokenizer/resolve/main/tokenizer.json")
    use_published = vocab_size == 49_152
    return Source(f"cosmopedia-{mb}MB", None, [text], strict=True, limit=mb << 20,
                  tokenizer=tokenizer if use_published else None,
                  downloads=[(text, mb << 20, fetch_rows, rows)] + [published] * use_published)


CORPORA = {"stdlib": stdlib, "tinystories": tinystories, "cosmopedia": cosmopedia}


# ----------------------------------------------------------------------------------------------------------------------
# Preparing: three passes over the text, by one process a core


def plan(files, limit=None, block=0, split=None):
    """Tasks (bytes, [(path, start, end), ...], block, split) of about SPAN bytes: part of a big file, or many files."""
    tasks, batch, total = [], [], 0
    for path in files:
        at = cuts(path, limit)
        for start, end in zip(at, at[1:]):
            batch.append((path, start, end))
            total += end - start
            if total >= SPAN or len(batch) >= 4096:
                tasks.append((total, batch, block, split))
                batch, total = [], 0
    return tasks + [(total, batch, block, split)] * bool(batch)


def cuts(path, limit):
    """[0, ..., size of the file]: a span ends where a document does, or else a paragraph, line, word or character."""
    try:
        size, at, end = os.path.getsize(path), [0], EOT.encode()
        if not size or size <= SPAN and not limit:
            return [0, size]
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            if text.find(b"\0", 0, 8192) >= 0:  # a huge binary file is not worth reading to its end
                return [0, 0]
            if limit and limit <= size:  # up to the last document that lies whole within the limit
                size = max(text.rfind(end, 0, limit), 0) or limit
            own_documents = text.find(end, 0, LONGEST) >= 0
            while (start := at[-1] + SPAN) < size:
                if own_documents and start + LONGEST >= size and text.find(end, start, size) < 0:
                    break  # the last document, if nothing marks its end
                for mark, reach in [(end, LONGEST)] * own_documents + [(m, SPAN // 4) for m in (b"\n\n", b"\n", b" ")]:
                    if (cut := text.find(mark, start, min(start + reach, size)) + len(mark)) > start:
                        break
                else:
                    cut = next((i for i in range(start, min(start + 4, size)) if text[i] & 0xC0 != 0x80), size)
                at.append(cut)
        return at + [size] * (size > at[-1])
    except OSError:  # who reads it will report it
        return [0, 0]


def documents(task, problems=None):
    """Yield (64 bits of its content's hash, bytes, text) of each document; note in `problems` what is not text."""
    _, batch, block, _ = task
    for path, start, end in batch:
        try:
            with open(path, "rb") as file:
                file.seek(start)
                text = file.read(end - start).decode()
            if "\0" in text or not end and os.path.getsize(path):
                raise ValueError("binary")
        except (OSError, ValueError) as e:
            problems is None or problems.append(f"{path} is not UTF-8 text ({e})")
            continue
        if EOT in text:
            docs = map(str.strip, text.split(EOT))
        else:
            docs, at = [], 0
            while block and len(text) - at > block:  # cut at the last blank line in reach, or else line, or else word
                ends = (text.rfind(mark, at, at + block) + len(mark) for mark in ("\n\n", "\n", " "))
                docs.append(text[at:(at := next((end for end in ends if end > at + 2), at + block))])
            docs.append(text[at:])
        for doc in filter(None, docs):
            raw = doc.encode()
            yield int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"), len(raw), doc


def scan(task):
    """Pass 1: (hash, bytes) of each document."""
    return np.array([(name, size) for name, size, _ in documents(task)], np.uint64).reshape(-1, 2)


def count(task, held_out):
    """Pass 2: how often each piece occurs in the training documents."""
    pieces = Counter()
    for name, _, doc in documents(task):
        if name not in held_out:
            pieces.update(piece_pattern(doc.isascii()).findall(doc))
    return pieces


def encode(task, held_out, tokenizer):
    """Pass 3: the ids of both sides, what was counted, and the problems met."""
    ids, seen, problems = {"train": [], "val": []}, Counter(), []
    tokenizer = load_tokenizer(tokenizer)
    for name, size, doc in documents(task, problems):
        side = "val" if name in held_out else "train"
        if side == "val" and task[3] == "train":  # a training document that is also in the corpus's validation text
            seen["dropped_documents"] += 1
            continue
        ids[side] += tokenizer.encode_str(doc), chr(tokenizer.eot)
        seen.update({f"{side}_bytes": size, f"{side}_documents": 1})
    return *("".join(ids[side]).encode("utf-16-le", "surrogatepass") for side in ("train", "val")), seen, problems


load_tokenizer = lru_cache(1)(Tokenizer.load)  # once in each process


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()  # and its death is theirs


def parallel(pool, work, tasks, label):
    """Yield work(task) for each task, in order."""
    with tqdm(total=sum(task[0] for task in tasks), desc=f"{label:9}", unit="B", unit_scale=True, disable=None) as bar:
        for task, result in zip(tasks, pool.map(work, tasks)):
            yield result
            bar.update(task[0])


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_validation(docs):
    """The documents with the lowest hashes, until they have 5% of the bytes (10% of a small corpus, at most 16 MB).
    A document's content decides, so equal documents stand on the same side."""
    total = int(docs[:, 1].sum())
    target = min(max(total // 20, min(total // 10, 1 << 16)), 1 << 24)
    docs = docs[docs[:, 1] <= max(target, docs[:, 1].min(initial=2**63))]
    docs = docs[np.argsort(docs[:, 0])]
    return frozenset(docs[:np.searchsorted(np.cumsum(docs[:, 1]), target) + 1, 0].tolist())


def prepare(source, vocab_size, folder):
    """Make tokenizer.json, train.bin, val.bin and meta.json in a new folder."""
    for what in source.downloads:
        download(*what)
    folder.mkdir()
    val_tasks = plan([source.val_file]) if source.val_file else []
    tasks = plan(source.files, source.limit, source.block, "train" if val_tasks else None)
    context = get_context("fork" if sys.platform == "linux" else "spawn")  # forked processes need not import anything
    pool = ProcessPoolExecutor(max(min(cores(), len(tasks), 16), 1), context, start_worker)
    with pool, open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        scanned = np.concatenate([np.zeros((0, 2), np.uint64), *parallel(pool, scan, val_tasks or tasks, "reading")])
        held_out = frozenset(scanned[:, 0].tolist()) if val_tasks else choose_validation(scanned)
        if source.tokenizer:
            tokenizer = Tokenizer.load(source.tokenizer)
        else:
            pieces = Counter()
            for part in parallel(pool, partial(count, held_out=held_out), tasks, "counting"):
                pieces.update(part)
                if len(pieces) > 2_000_000:  # bounds the memory: what occurred once in so much text decides no merge
                    pieces = Counter({piece: n for piece, n in pieces.items() if n > 1})
            tokenizer = train_bpe(pieces, vocab_size)
            del pieces
            if tokenizer.vocab_size < vocab_size:
                print(f"{source.name} gives {tokenizer.vocab_size:,} of the {vocab_size:,} tokens asked for: no pair "
                      "of tokens is left that occurs twice", file=sys.stderr)
        tokenizer.save(folder / "tokenizer.json")
        seen, problems = Counter({f"{side}_documents": 0 for side in ("train", "val")}), []
        work = partial(encode, held_out=held_out, tokenizer=folder / "tokenizer.json")
        for train_ids, val_ids, more, found in parallel(pool, work, tasks + val_tasks, "encoding"):
            train.write(train_ids)
            val.write(val_ids)
            seen.update(more)
            problems += found
    n_documents = seen["train_documents"] + seen["val_documents"]
    if problems and (source.strict or not n_documents):
        raise DataError(f"{problems[0]}: convert it to UTF-8 text, or use another corpus")
    if not seen["train_documents"] or not seen["val_documents"]:
        raise DataError(f"{source.name} has {n_documents} documents: two different ones are needed, one to train on "
                        "and one to validate on")
    meta = {"corpus": source.name, "format": FORMAT, "source": source.identity, "vocab_size": tokenizer.vocab_size,
            "documents": n_documents, **seen, "skipped_files": len(problems)}
    for side in "train", "val":
        file = folder / f"{side}.bin"
        meta |= {f"{side}_tokens": file.stat().st_size // 2, f"{side}_sha256": content_hash(file)}
    meta["check"] = {file.name: quick_check(file) for file in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def content_hash(path, stride=1, git=False):
    """SHA-256 of a file, or of every stride-th MiB of it; or the SHA-1 that git knows it by."""
    size = os.path.getsize(path)
    result = hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, size, stride << 20):
            file.seek(start)
            result.update(file.read(1 << 20))
    return result.hexdigest()


def quick_check(path):
    """[size, hash] of a whole file up to 128 MiB, of 64 to 128 MiB of a larger one: it takes about 0.1 s."""
    return [size := os.path.getsize(path), content_hash(path, max(size >> 26, 1))]


# ----------------------------------------------------------------------------------------------------------------------
# Loading: a prepared corpus, its batches and its validation windows


@dataclass
class Corpus:
    folder: Path
    meta: dict
    tokenizer: Tokenizer
    train: np.ndarray  # (train_tokens,) uint16, mapped from the file
    val: np.ndarray  # (val_tokens,) uint16


def reopen(folder, identity):
    """The corpus in a folder, or None if it is not there, not whole, or was made from another text."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = all(quick_check(folder / name) == check for name, check in meta["check"].items())
        if meta["format"] != FORMAT or meta["source"] != identity or not whole:
            return None
    except (OSError, ValueError, KeyError):
        return None
    train, val = (np.memmap(folder / f"{side}.bin", "<u2", "r") for side in ("train", "val"))
    return Corpus(folder, meta, Tokenizer.load(folder / "tokenizer.json"), train, val)


def load(name, vocab_size, n_tokens=None, cache="data"):
    """The corpus `name` (of CORPORA, or a path) with at most vocab_size tokens, prepared under `cache` when needed.

    n_tokens: how many training tokens the run will read; corpora from the network fetch no more than that needs.
    Raises DataError, in one line, for what a user can put right.
    """
    if not 257 <= vocab_size <= 65536:
        raise DataError(f"a vocabulary of {vocab_size:,} is not possible: use 257 (bytes, {EOT}) to 65,536 (16 bits)")
    cache = Path(cache)
    try:
        if name in CORPORA:
            source = CORPORA[name](cache.resolve(), n_tokens, vocab_size)
        elif os.path.exists(name):
            source = path_source(name, cache.resolve())
        else:
            raise DataError(f"unknown corpus '{name}': use {', '.join(CORPORA)}, or the path of a text file or folder")
        folder = cache / f"{source.name}-{vocab_size}"
        if corpus := reopen(folder, source.identity):
            return corpus
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:  # one process at a time; the system frees it when a process dies
            if fcntl:
                fcntl.lockf(lock, fcntl.LOCK_EX)
            if corpus := reopen(folder, source.identity):  # another process made it while this one waited
                return corpus
            temporary = cache / f".{folder.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            try:
                prepare(source, vocab_size, temporary)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return reopen(folder, source.identity)
    except OSError as e:
        raise DataError(f"cannot use {e.filename or cache}: {e.strerror or e}; prepared corpora are kept in '{cache}', "
                        "which must be a folder that you can write to") from None


def windows(tokens, starts, context_length):
    """x, y: (len(starts), context_length) int64 tensors on the CPU, y one token later."""
    import torch  # not at the top: the processes that prepare a corpus need none
    both = np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)[starts].astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(both[:, :-1].copy()), torch.from_numpy(both[:, 1:].copy())


def get_batch(tokens, batch_size, context_length, seed, step):
    """x, y: (batch_size, context_length) int64. A pure function of its arguments.

    A counter-based generator (Philox, Salmon et al. 2011) with (seed, step) as its key draws where the windows start:
    every learning rate sees the same batches, and a resumed run needs no generator state. They start anywhere, so the
    order of the documents in the file does not matter.
    """
    if len(tokens) <= context_length:
        raise DataError(f"the training text has {len(tokens):,} tokens: use --context-length {len(tokens) - 1} or less")
    random = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, step % 2**64], np.uint64)))
    return windows(tokens, random.integers(0, len(tokens) - context_length, batch_size), context_length)


def val_windows(tokens, context_length, max_tokens):
    """x, y: (W, context_length) int64: always the same windows, spread evenly, none overlapping another, W *
    context_length at most max_tokens (but W at least 1)."""
    available = (len(tokens) - 1) // context_length
    if available < 1:
        raise DataError(f"the validation text has {len(tokens):,} tokens, too few for a context of {context_length:,}: "
                        f"use --context-length {len(tokens) - 1} or less, or a longer text")
    n = min(max(max_tokens // context_length, 1), available)
    return windows(tokens, np.arange(n) * available // n * context_length, context_length)


# ----------------------------------------------------------------------------------------------------------------------
# python data.py NAME


def show(corpus):
    """What a learner wants to see of a corpus."""
    meta, tokenizer = corpus.meta, corpus.tokenizer
    print(f"{corpus.folder}: {meta['documents']:,} documents, {meta['skipped_files']:,} files skipped (no UTF-8 text); "
          f"{tokenizer.vocab_size:,} tokens in the vocabulary")
    for side in "train", "val":
        n_bytes, n_tokens = meta[f"{side}_bytes"], meta[f"{side}_tokens"]
        print(f"  {side:5} {meta[f'{side}_documents']:9,} documents {n_bytes:13,} bytes {n_tokens:13,} tokens "
              f"{n_bytes / n_tokens:5.2f} bytes a token")
    counts = sum(np.bincount(corpus.train[start:start + (1 << 22)], minlength=tokenizer.vocab_size)
                 for start in range(0, len(corpus.train), 1 << 22))
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    print(f"A model that knows only how often each token occurs has a loss of {entropy * np.log(2):.3f} nats a token, "
          f"{entropy * meta['train_tokens'] / meta['train_bytes']:.3f} bits a byte; yours must get below that.")
    text = [tokenizer.bytes.get(i, b"").decode("utf-8", "backslashreplace") for i in range(tokenizer.vocab_size)]
    print("Longest tokens:", *map(repr, sorted(text, key=len)[:-13:-1]))
    print("The validation text begins (| between tokens):", "|".join(text[i] for i in corpus.val[:150]), sep="\n")


def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus and show what a model will see.")
    parser.add_argument("name", nargs="?", default="stdlib", help=f"{', '.join(CORPORA)}, or a text file or folder")
    parser.add_argument("--vocab-size", type=int, help="default: tinystories 10,000, cosmopedia 49,152, others 2,048")
    parser.add_argument("--tokens", type=float, help="training tokens wanted, for a corpus from the network; default: "
                        "tinystories all, cosmopedia 500,000")
    parser.add_argument("--cache", default="data", help="where prepared corpora are kept")
    args = parser.parse_args()
    vocab_size = args.vocab_size or {"tinystories": 10_000, "cosmopedia": 49_152}.get(args.name, 2048)
    try:
        show(load(args.name, vocab_size, args.tokens and int(args.tokens), args.cache))
        sys.stdout.flush()
    except DataError as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; run it again to go on")
    except BrokenPipeError:  # whoever read the lines has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
