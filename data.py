"""
Text in, batches of token ids out.

A corpus is a stream of documents. Those with the lowest content hashes, 5% of the bytes, are the validation
text; byte pair encoding (BPE) is trained on the others; both sides are kept as flat files of 16-bit token ids
with <|endoftext|> after each document. Training reads windows of them at random places, and which places is a
pure function of (seed, step).

BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) starts from the 256 bytes and again and again makes
the most frequent pair of neighbours a new token. Two ideas make it fast in plain Python:
- Merges never cross a piece (a word with its leading space, a number, a run of punctuation), so equal pieces
  are counted and merged once, however often they occur.
- A piece is a str whose characters are token ids. Merging a pair is then str.replace, putting a document
  together is str.join, and writing it as 16-bit ids is encoding it as UTF-16.

    python data.py stdlib                      # the running Python's own library: no network
    python data.py my.txt --vocab-size 1000    # or a folder; each file is a document
    python data.py tinystories --tokens 4e7    # from the Hugging Face hub, as much as 40 M tokens need

prepares a corpus under data/ and shows what a model will see. tokenizer.json is the format of Hugging Face's
`tokenizers` library, both ways, with the same ids for every character that this Python's Unicode tables know
(unicodedata.unidata_version: 13 in Python 3.10, 15.1 in 3.13); a newer letter may be cut into other pieces.
"""

import argparse
import codecs
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from http.client import HTTPException
from itertools import islice
from multiprocessing import get_context, parent_process
from operator import add
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

EOT = "<|endoftext|>"
FORMAT = 2  # raise it when prepared files change their meaning: new ones are then made
CHUNK = 1 << 20  # bytes or ids at a time; a longer document is cut, which bounds the memory


class DataError(ValueError):
    """Bad input, in one line: what is wrong, with which value, and what to do."""

    def __init__(self, message):
        super().__init__(re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", message))


# ------------------------------------------------------------------------------------------------------------
# Tokenizer: text to ids and back

# GPT-2's stand-ins for the 256 bytes, the alphabet of a tokenizer.json: printable Latin-1 characters stand
# for themselves, the other bytes for the characters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
BYTE_TO_CHAR = dict(zip(BYTES, map(chr, [*PRINTABLE, *range(256, 512)])))
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# Two ways of cutting text into pieces are understood: GPT-2's, and the same after setting digits apart.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True, "trim_offsets": True, "use_regex": True}
PLAIN_KEYS = {"type", "unk_token", "vocab", "merges", "id", "content", "special", "normalized"}


@lru_cache
def piece_pattern(ascii, digits=False):
    r"""GPT-2's pattern: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re has no \p, but its \w is just L, N and "_", and its \d is Nd, so only No and Nl need a list.
    Its \s takes U+001C..U+001F for spaces, which Unicode does not. Long classes are slow, so text that is all
    ASCII has a pattern of its own, over 3 times as fast. digits: each digit is a piece.
    """
    other = ""  # numbers that are no digits
    space = "\t-\r "
    letter = "[A-Za-z]"
    symbol = "[^A-Za-z0-9\t-\r ]"
    if not ascii:
        below = map(chr, range(0x20000))  # there are none above
        other = "".join(char for char in below if unicodedata.category(char) in ("No", "Nl"))
        space += "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
        letter = rf"(?:[A-Za-z]+|[^\W\d_{other}])"
        symbol = rf"(?:[!-/:-@\[-`{{-~]|[^\w{space}])"
    number = rf" ?[\d{other}]+"
    end = space
    if digits:  # a digit ends the text before it, spaces and all
        number = rf"[\d{other}]"
        end = rf"{space}\d{other}"
    words = rf"'(?:[stmd]|re|ve|ll)| ?{letter}+|{number}| ?{symbol}+"
    return re.compile(rf"{words}|[{space}]+(?![^{end}])|[{space}]+")


class Tokenizer:
    """Byte-level BPE from the content of a tokenizer.json. Inside, the token i is the character chr(i).

    vocab_size: 1 + the largest id. eot: the id of <|endoftext|>. bytes: {id: bytes}. load raises DataError
    for a file that may give other ids here than in the `tokenizers` library.
    """

    def __init__(self, spec):
        model = spec["model"]
        added = spec["added_tokens"]
        steps = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
        steps = [{"use_regex": True, **step, "trim_offsets": True} for step in steps]
        odd = {key for part in [model, *added] for key in part if part[key]} - PLAIN_KEYS
        known = steps in ([BYTE_LEVEL], [DIGITS, BYTE_LEVEL]) and model["type"] == "BPE"
        if odd or not known or spec.get("normalizer"):
            raise DataError("only byte-level BPE in the form of GPT-2's or cosmo2's is supported")
        self.special = {token["content"]: token["id"] for token in added}
        vocab = {**model["vocab"], **self.special}
        if "" in vocab or not all(type(i) is int and 0 <= i < 65536 for i in vocab.values()):
            raise DataError("not all ids are from 0 to 65,535")

        self.spec = spec
        self.digits = DIGITS in steps
        self.vocab_size = max(vocab.values()) + 1
        self.eot = vocab[EOT]
        self.bytes = {i: token.encode() for token, i in self.special.items()}
        for token in vocab.keys() - self.special.keys():
            self.bytes[vocab[token]] = bytes(CHAR_TO_BYTE[char] for char in token)
        chars = {token: chr(i) for token, i in vocab.items()}
        unknown = chars.get(model.get("unk_token"))  # None: a byte that is no token is left out
        self.symbols = {byte: chars.get(char, unknown) for byte, char in BYTE_TO_CHAR.items()}
        self.merges = {}  # {two characters: (rank, the one that takes their place)}
        for pair in model["merges"]:
            a, b = pair.split(" ") if isinstance(pair, str) else pair
            self.merges[chars[a] + chars[b]] = len(self.merges), chars[a + b]
        names = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.tokens = lru_cache(1 << 18)(self.merge)  # bounded: a huge corpus has no end of rare pieces

    @classmethod
    def load(cls, path):
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except Exception as e:  # anything may be wrong with a file made elsewhere
            raise DataError(f"{path} is no tokenizer.json that can be used ({e!r}): replace it") from None

    def save(self, path):
        Path(path).write_text(json.dumps(self.spec, ensure_ascii=False, indent=1), encoding="utf-8")

    def merge(self, piece):
        """One piece: its bytes, in which the pair that was learnt first is merged until none is left."""
        if len(piece) > 10_000:  # no word of any language, and it would take hours
            return self.merge(piece[:10_000]) + self.merge(piece[10_000:])
        word = piece.encode().decode("latin-1").translate(self.symbols)
        while pairs := self.merges.keys() & map(add, word, word[1:]):
            first = min(pairs, key=self.merges.get)
            word = word.replace(first, self.merges[first][1])
        return word

    def encode_str(self, text):
        """The ids of a text as the characters of a str."""
        pieces = piece_pattern(text.isascii(), self.digits).findall
        out = []
        for i, part in enumerate(self.special_pattern.split(text)):
            if i % 2:  # every other part is a special token
                out.append(chr(self.special[part]))
            else:
                out.extend(map(self.tokens, pieces(part)))
        return "".join(out)

    def encode(self, text):
        return list(map(ord, self.encode_str(text)))

    def decode(self, ids):
        return b"".join(self.bytes[int(i)] for i in ids).decode("utf-8", errors="replace")


def train_bpe(pieces, vocab_size):
    """Learn merges from a Counter of pieces, until there are vocab_size tokens or no pair occurs twice.

    The most frequent pair goes first; of equals the one with the lower ids. Counts are kept up to date and an
    index tells which words may hold a pair, so that a merge costs only what it changes. The ids are those
    that the trainer of the `tokenizers` library gives with this special token and the alphabet of bytes.
    """
    tokens = [EOT, *sorted(CHAR_TO_BYTE)]
    symbols = {byte: chr(tokens.index(char)) for byte, char in BYTE_TO_CHAR.items()}
    pieces = {piece: n for piece, n in pieces.items() if len(piece) <= 1000}  # a long one would take hours
    words = [piece.encode().decode("latin-1").translate(symbols) for piece in pieces]
    frequency = list(pieces.values())
    counts = Counter()  # of each pair
    places = defaultdict(list)  # the words that hold it, or did
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            counts[pair] += frequency[i]
            places[pair].append(i)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapify(queue)

    merges = []
    while queue and len(tokens) < vocab_size:
        count, pair = heappop(queue)
        if -count != counts[pair]:  # it has fallen since this entry was made: queue the right one
            heappush(queue, (-counts[pair], pair))
            continue
        if -count < 2:
            break
        a, b = (tokens[ord(symbol)] for symbol in pair)
        merges.append(f"{a} {b}")
        new = chr(len(tokens))
        tokens.append(a + b)
        changed = set()
        for i in places.pop(pair):
            old = words[i]
            if pair not in old:  # an earlier merge took it, or this word was listed twice
                continue
            words[i] = old.replace(pair, new)
            for p in map(add, old, old[1:]):
                counts[p] -= frequency[i]
            for p in map(add, words[i], words[i][1:]):
                counts[p] += frequency[i]
                if new in p:
                    places[p].append(i)
                    changed.add(p)
        for p in changed:
            heappush(queue, (-counts[p], p))

    vocab = {token: i for i, token in enumerate(tokens)}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return Tokenizer({"version": "1.0", "added_tokens": [{"id": 0, "content": EOT, "special": True, **flags}],
                      "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL,
                      "model": {"type": "BPE", "vocab": vocab, "merges": merges}})


# ------------------------------------------------------------------------------------------------------------
# Corpora: which files hold the text

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
ROWS = os.environ.get("HF_DATASETS_SERVER", HUB.replace("://", "://datasets-server.")).rstrip("/")
REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"  # of TinyStories: a revision never changes
WAITS = (1, 2, 4, 8, 16)  # seconds before an attempt after one, two ... that brought nothing


def download(url, path, n_bytes=None):
    """Fetch a text file, or its first n_bytes, unless it is there already, fetched or put there by hand.

    It arrives in path.part, whose length says where to go on, and gets its name when it is complete. Raises
    DataError when trying again is of no use.
    """
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    with open(part, "ab") as file, tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        while n_bytes is None or file.tell() < n_bytes:
            have = file.tell()
            try:
                receive(url, file, n_bytes)
                break
            except (URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as e:
                failures += 1
                if file.tell() > have:
                    failures = 1
                status = getattr(e, "code", 503)  # no answer, or half of one
                no_network = type(e) is URLError and failures == 1
                refused = status < 500 and status not in (408, 416, 425, 429) or isinstance(e, ValueError)
                if refused or no_network or failures > len(WAITS):
                    hint = f"put it at {path} by hand, or use --data stdlib, which needs no network"
                    raise DataError(f"cannot fetch {path.name} from {url} ({e}): {hint}") from None
                if status == 416:  # what is here is longer than the file
                    file.seek(file.truncate(0))
                wait = str(getattr(e, "headers", {}).get("Retry-After"))
                if not re.fullmatch("[0-9]{1,3}", wait):
                    wait = WAITS[failures - 1]
                time.sleep(int(wait))
            bar.update(file.tell() - have)
    part.replace(path)


def receive(url, file, n_bytes):
    """Append what one answer brings of the first n_bytes (None: all). ConnectionError: that was not all."""
    headers = {"User-Agent": "nanoLR", "Range": f"bytes={file.tell()}-"}
    if n_bytes:
        headers["Range"] += str(n_bytes - 1)
    request = Request(url, headers=headers)
    token = re.sub("[^!-~]", "", os.environ.get("HF_TOKEN", ""))  # an error would show one with a line break
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # goes to no other host
    with urlopen(request, timeout=30) as response:
        if response.status != 206:  # a server that ignores Range sends it all
            file.seek(file.truncate(0))
        while chunk := response.read(1 << 18):
            # A chunk may begin and end within a character, which is lost here: at most 3 bytes on each side.
            lost = len(chunk) - len(chunk.decode("utf-8", "ignore").encode())
            page = not file.tell() and re.match(rb"\s*<[!?a-z]", chunk, re.IGNORECASE)
            if lost > 6 or b"\0" in chunk or page:
                raise ValueError("it sent a web page or binary data in place of text")
            file.write(chunk)
        if response.length:
            raise ConnectionError(f"{response.length:,} bytes of the answer are missing")


def tinystories(folder, megabytes, vocab_size):
    """Short stories in the words of small children (Eldan & Li 2023), as GPT-4 wrote them: 2.2 GB."""
    url = f"{HUB}/datasets/roneneldan/TinyStories/resolve/{REVISION}/TinyStoriesV2-GPT4"
    train = folder / f"TinyStoriesV2-GPT4-train-{megabytes}MB.txt"
    val = folder / "TinyStoriesV2-GPT4-valid.txt"
    download(f"{url}-valid.txt", val)
    download(f"{url}-train.txt", train, megabytes << 20)
    return [train], [val], None


def cosmopedia(folder, megabytes, vocab_size):
    """Synthetic textbooks and posts (Ben Allal et al. 2024); the published tokenizer, if of that size."""
    tokenizer = None
    if vocab_size == 49_152:
        tokenizer = folder / "cosmo2-tokenizer.json"
        download(f"{HUB}/HuggingFaceTB/cosmo2-tokenizer/resolve/main/tokenizer.json", tokenizer)
    path = folder / f"cosmopedia-v2-{megabytes}MB.txt"
    url = f"{ROWS}/rows?dataset=HuggingFaceTB%2Fsmollm-corpus&config=cosmopedia-v2&split=train&length=100"
    text = ""
    rows = range(100)
    n_rows = 0
    while not path.exists() and len(rows) == 100 and len(text) < megabytes << 20:
        page = folder / f"cosmopedia-v2-rows-{n_rows}.json"
        download(f"{url}&offset={n_rows}", page)
        try:
            rows = [row["row"]["text"] for row in json.loads(page.read_bytes())["rows"]]
        except (ValueError, KeyError, TypeError) as e:
            page.unlink()
            raise DataError(f"{ROWS} sent no rows of text ({e!r}): try again, or use --data stdlib") from None
        text += "".join(f"{row}\n{EOT}\n" for row in rows if row)
        n_rows += len(rows)
    if text:
        part = path.with_name(path.name + ".part")
        part.write_bytes(text.encode(errors="replace"))
        part.replace(path)
    return [path], [], tokenizer


# How to fetch it, bytes a token (and a little more to validate on), and for how many tokens by default.
NETWORK = {"tinystories": (tinystories, 4.2, 550_000_000), "cosmopedia": (cosmopedia, 5.0, 500_000)}


def files_of(name, cache):
    """The sorted paths of a text file, of the files in a folder, or of the standard library's source."""
    root = os.path.abspath(name)
    suffix = ""
    skip = {"__pycache__"}
    if name == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        suffix = ".py"
        skip |= {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    elif not os.path.exists(root):
        raise DataError(f"unknown corpus '{name}': use stdlib, tinystories, cosmopedia or a path")
    if os.path.isfile(root):
        return [root]
    os.scandir(root).close()  # raises what os.walk would hide: that it is no folder, or cannot be read
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d[0] != "." and d not in skip and Path(folder, d) != cache]
        found += [os.path.join(folder, name) for name in names if name.endswith(suffix) and name[0] != "."]
    return sorted(filter(os.path.isfile, found))


# ------------------------------------------------------------------------------------------------------------
# Preparing: documents go to one process a core


def documents(path, alone):
    """Yield the documents of a file: what stands between <|endoftext|>, or all of it.

    alone: without <|endoftext|> cut it into blocks, so that plain text has a validation side too: neighbours
    of training text, never the same. Raises ValueError for what is no UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    longest = CHUNK  # characters
    text = ""
    marked = False
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            if b"\0" in chunk:
                raise ValueError("binary")
            *whole, text = (text + decoder.decode(chunk)).split(EOT)
            marked = marked or bool(whole)
            yield from map(str.strip, whole)
            if alone and not marked:
                longest = min(max(os.path.getsize(path) // 64, 128), 8192)
            while len(text) > longest:  # cut at the end of a line
                end = text.rfind("\n", 0, longest) + 1 or longest
                yield text[:end]
                text = text[end:]
    if marked:
        text = text.strip()
    yield text


def read(files, skipped):
    """Yield (64 bits of its content's hash, document) of all; add the files that are no text to `skipped`."""
    alone = len(files) == 1
    for path in files:
        try:
            for document in filter(None, documents(path, alone)):
                content_hash = hashlib.blake2b(document.encode(), digest_size=8).digest()
                yield int.from_bytes(content_hash, "little"), document
        except (OSError, ValueError) as e:
            if alone:
                hint = "convert it, or, if it was fetched, delete it to fetch it again"
                raise DataError(f"{path} is not UTF-8 text ({e}): {hint}") from None
            skipped.add(path)


def choose_validation(documents):
    """The hashes of the documents to validate on: the lowest, until they have 5% of the bytes (10% of few).

    Content decides, so equal documents are on the same side. A document larger than all that stays out.
    """
    sizes = sorted((content_hash, len(document.encode())) for content_hash, document in documents)
    total = sum(size for _, size in sizes)
    target = max(total // 20, min(total // 10, 1 << 16))
    largest = max(target, min((size for _, size in sizes), default=0))
    chosen = set()
    n_bytes = 0
    for content_hash, size in sizes:
        if n_bytes < target and size <= largest:
            chosen.add(content_hash)
            n_bytes += size
    return chosen


def count(batch):
    """How often each piece occurs in some documents."""
    pieces = Counter()
    for document in batch:
        pieces.update(piece_pattern(document.isascii()).findall(document))
    return pieces


load_tokenizer = lru_cache(1)(Tokenizer.load)  # once in each process


def encode(batch, tokenizer_path):
    """The ids of some documents, as little-endian uint16."""
    tokenizer = load_tokenizer(tokenizer_path)
    ids = "".join(tokenizer.encode_str(document) + chr(tokenizer.eot) for document in batch)
    return ids.encode("utf-16-le", "surrogatepass")


def cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle, and its death for all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends its processes
    sys.stderr = open(os.devnull, "w")  # errors are passed on; that the parent is gone is none
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def prepare(files, val_files, tokenizer_path, vocab_size, folder):
    """Make tokenizer.json, train.bin and val.bin in a folder; return how many files were no text.

    val_files: the validation text that comes with a corpus; if there is none, some documents are held out.
    """
    skipped = set()
    if val_files:
        held_out = {content_hash for content_hash, _ in read(val_files, skipped)}
    else:
        held_out = choose_validation(read(files, skipped))

    def batches(paths, validation):
        chosen = (text for name, text in read(paths, skipped) if (name in held_out) == validation)
        while batch := list(islice(chosen, 32)):
            yield batch

    context = get_context("fork" if sys.platform == "linux" else "spawn")  # a fork need not import anything
    with context.Pool(min(cores(), 16), start_worker) as pool:
        if tokenizer_path:
            tokenizer = Tokenizer.load(tokenizer_path)
        else:
            pieces = Counter()
            for part in tqdm(pool.imap(count, batches(files, False)), "counting", disable=None):
                pieces.update(part)
                if len(pieces) > 2_000_000:  # bounds the memory: what occurred once in so much is no loss
                    pieces = Counter({piece: n for piece, n in pieces.items() if n > 1})
            tokenizer = train_bpe(pieces, vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        work = partial(encode, tokenizer_path=folder / "tokenizer.json")
        for side, paths in (("train", files), ("val", val_files or files)):
            with open(folder / f"{side}.bin", "wb") as file:
                file.writelines(tqdm(pool.imap(work, batches(paths, side == "val")), side, disable=None))
                if not file.tell():
                    raise DataError(f"no text to {side} with in {[*map(str, files[:3])]}: a corpus needs two "
                                    f"different documents ({len(skipped)} files are no UTF-8 text)")
    return len(skipped)


# ------------------------------------------------------------------------------------------------------------
# Loading: a prepared corpus, its batches and its validation windows


@dataclass
class Corpus:
    folder: Path
    meta: dict
    tokenizer: Tokenizer
    token_bytes: np.ndarray  # (vocab_size,) int64, the bytes that each id stands for, 0 for <|endoftext|>
    train: np.ndarray  # (train_tokens,) uint16, mapped from the file
    val: np.ndarray  # (val_tokens,) uint16


def count_tokens(tokens, vocab_size):
    """(vocab_size,) how often each id occurs; a part at a time, as bincount makes int64 of it."""
    parts = [tokens[start:start + CHUNK] for start in range(0, len(tokens), CHUNK)]
    return sum(np.bincount(part, minlength=vocab_size) for part in parts)


def open_corpus(folder, meta):
    """The corpus in a folder; all that its files tell is added to `meta`."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    token_bytes = np.array([len(tokenizer.bytes.get(i, b"")) for i in range(tokenizer.vocab_size)])
    token_bytes[tokenizer.eot] = 0
    meta = {**meta, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": digest(tokenizer.spec)}
    sides = []
    for side in ("train", "val"):
        tokens = np.memmap(folder / f"{side}.bin", "<u2", "r")
        counts = count_tokens(tokens, tokenizer.vocab_size)
        meta[f"{side}_documents"] = int(counts[tokenizer.eot])
        meta[f"{side}_bytes"] = int(counts @ token_bytes)
        meta[f"{side}_tokens"] = len(tokens)
        meta[f"{side}_sha256"] = hashlib.sha256(tokens).hexdigest()
        sides.append(tokens)
    meta["documents"] = meta["train_documents"] + meta["val_documents"]
    return Corpus(folder, meta, tokenizer, token_bytes, *sides)


def reopen(folder, known):
    """The corpus in a folder, or None if it is not there, or not as it was when meta.json was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        corpus = open_corpus(folder, {**known, "skipped_files": meta["skipped_files"]})
        if corpus.meta == meta:
            return corpus
    except Exception:  # whatever the damage, it is made anew
        pass
    return None


def load(name, vocab_size, n_tokens=None, cache="data"):
    """The corpus `name` (stdlib, tinystories, cosmopedia or a path) with at most vocab_size tokens.

    It is prepared in a folder under `cache` if it is not there yet. n_tokens: how many training tokens a run
    will read; no more is fetched from the network than that. Raises DataError for what a user can put right.
    """
    if not 257 <= vocab_size <= 65536:
        raise DataError(f"a vocabulary of {vocab_size:,} is not possible: use 257 (bytes, {EOT}) to 65,536")
    cache = Path(os.path.abspath(cache))
    try:
        if name in NETWORK:
            fetch, bytes_per_token, default = NETWORK[name]
            # To two digits, so that runs of nearly the same budget share a folder.
            megabytes = int(float(f"{(n_tokens or default) * bytes_per_token / 2**20 + 1:.1e}"))
            label = f"{name}-{megabytes}MB"
            content = REVISION
        else:
            text = [files_of(name, cache), [], None]
            label = os.path.basename(os.path.abspath(name))[:100]
            content = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in text[0]]
        source = digest((FORMAT, content))
        known = {"corpus": label, "format": FORMAT, "source": source}
        folder = cache / f"{label}-{source[:6]}-{vocab_size}"
        corpus = reopen(folder, known)
        if corpus:
            return corpus

        with lock(cache, wait=True):  # one process at a time
            corpus = reopen(folder, known)
            if corpus:  # another process made it while this one waited
                return corpus
            if name in NETWORK:
                text = fetch(cache / "downloads", megabytes, vocab_size)
            aside = cache / f".{folder.name}.tmp"
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
            aside.mkdir()
            try:
                known["skipped_files"] = prepare(*text, vocab_size, aside)
                meta = open_corpus(aside, known).meta
                (aside / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as e:
        hint = f"corpora are prepared in {cache}, which must be a folder that you can write to"
        raise DataError(f"cannot use {e.filename or cache}: {e.strerror or e} ({hint})") from None
    if meta["vocab_size"] < vocab_size:
        given = f"{meta['vocab_size']:,} of the {vocab_size:,} tokens asked for"
        print(f"{label} gives {given}: no pair is left that occurs twice", file=sys.stderr)
    return open_corpus(folder, known)


def lock(folder, wait=False):
    """Own a folder until the file that this returns is closed, or this process ends, however it ends.

    Raises DataError, which names the process, if another one owns it; wait: until that is over.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a+")
    while True:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.seek(1 << 30)  # a byte beyond the process's number, which stays readable
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            break
        except OSError:
            file.seek(0)
            if not wait:
                raise DataError(f"{folder} is in use by process {file.read()}: wait for it, or stop it") from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def digest(value):
    return hashlib.sha256(repr(value).encode(errors="surrogateescape")).hexdigest()


def windows(tokens, starts, context_length):
    """x, y: (len(starts), context_length) int64 tensors on the CPU, y one token later."""
    import torch  # not on top: the processes that prepare a corpus need none

    every = np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)
    both = every[starts].astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(both[:, :-1].copy()), torch.from_numpy(both[:, 1:].copy())


def get_batch(tokens, batch_size, context_length, seed, step):
    """x, y: (batch_size, context_length) int64. A pure function of its arguments.

    A counter-based generator (Philox, Salmon et al. 2011) with the key (seed, step) draws where the windows
    start: every learning rate sees the same batches, and a resumed run needs no generator state.
    """
    if len(tokens) <= context_length:
        hint = f"use --context-length {len(tokens) - 1} or less"
        raise DataError(f"the training text has {len(tokens):,} tokens: {hint}")
    key = np.array([seed % 2**64, step % 2**64], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    return windows(tokens, random.integers(0, len(tokens) - context_length, batch_size), context_length)


def val_windows(tokens, context_length, max_tokens):
    """x, y: (W, context_length) int64: always the same windows, spread evenly, none overlapping another, W *
    context_length at most max_tokens (but W at least 1)."""
    available = (len(tokens) - 1) // context_length
    if available < 1:
        hint = f"use --context-length {len(tokens) - 1} or less, or a longer text"
        raise DataError(f"the validation text has {len(tokens):,} tokens: {hint}")
    n = min(max(max_tokens // context_length, 1), available)
    return windows(tokens, np.arange(n) * available // n * context_length, context_length)


# ------------------------------------------------------------------------------------------------------------
# python data.py NAME


def show(corpus):
    """What a learner wants to see of a corpus."""
    meta = corpus.meta
    print(f"{corpus.folder}: {meta['documents']:,} documents, {meta['vocab_size']:,} different tokens, "
          f"{meta['skipped_files']:,} files skipped that are no UTF-8 text")
    for side in ("train", "val"):
        n_bytes = meta[f"{side}_bytes"]
        n_tokens = meta[f"{side}_tokens"]
        print(f"{side:5} {n_bytes:13,} bytes {n_tokens:13,} tokens {n_bytes / n_tokens:5.2f} bytes a token")
    p = count_tokens(corpus.train, meta["vocab_size"]) / meta["train_tokens"]
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    bits_per_byte = entropy / np.log(2) * meta["train_tokens"] / meta["train_bytes"]
    print(f"A model that knows only how often each token occurs has a loss of {entropy:.3f} nats a token, "
          f"{bits_per_byte:.3f} bits a byte; yours must get below that.")
    print("The validation text begins (| between tokens):")
    print("|".join(corpus.tokenizer.decode([i]) for i in corpus.val[:150]))


def fail(message):
    print(f"data.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus and show what a model will see.")
    parser.error = fail  # one line, without the usage
    parser.add_argument("name", nargs="?", default="stdlib", help="stdlib, tinystories, cosmopedia or a path")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=float, default=1e6, help="to fetch from the network (default: 1e6)")
    parser.add_argument("--cache", default="data", help="folder of prepared corpora (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.tokens <= 1e12:
        fail(f"--tokens {args.tokens:g}: use a number from 1 to 1e12")
    try:
        corpus = load(args.name, args.vocab_size, int(args.tokens), args.cache)
        if sys.stdout:
            sys.stdout.reconfigure(errors="backslashreplace")  # any token can be shown, whatever the locale
        show(corpus)
        print(end="", flush=True)
    except DataError as e:
        fail(e)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:  # whoever read the lines has gone (| head), or what they go to is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail(f"cannot write to the standard output: {e}")


if __name__ == "__main__":
    main()
