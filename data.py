"""
Text in, batches of token ids out.

A corpus is a list of documents. Those with the lowest content hashes, 5% of the bytes, are for validation,
byte pair encoding (BPE) is trained on the others, and both become flat files of 16-bit token ids, with
<|endoftext|> after each document. Training reads windows at places that (seed, step) alone determine.

BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) starts from the 256 bytes and again and again makes
the most frequent pair of neighbours a new token. Two ideas make it fast in plain Python. Merges never cross a
piece (a word with its leading space, a number, a run of punctuation), so equal pieces are counted and merged
once. And a piece is a str whose characters are token ids: merging is str.replace, writing is str.encode.

    python data.py stdlib                      # the running Python's own library: no network
    python data.py my.txt --vocab-size 1000    # or a folder; each file is a document
    python data.py tinystories --tokens 4e7    # from the Hugging Face hub, as much as 40 M tokens need

prepares a corpus under data/ and shows what a model will see. tokenizer.json has the format of Hugging Face's
`tokenizers`, with the same ids but for letters newer than this Python's Unicode (13 in 3.10, 15.1 in 3.13).
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from heapq import heappop, heappush
from http.client import HTTPException
from itertools import chain
from multiprocessing import parent_process
from operator import add
from pathlib import Path
from threading import Thread
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

EOT = "<|endoftext|>"

class DataError(ValueError):
    """Bad input, in one line: what is wrong, with which value, and what to do."""
    def __init__(self, message):
        super().__init__(re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", message))

# Tokenizer: text to ids and back ------------------------------------------------------------------

# GPT-2 writes each byte as a printable character: its own of Latin-1 or, where that has none, U+0100 and on.
spare = map(chr, range(256, 512))
BYTE_TO_CHAR = {b: chr(b) if b > 32 and chr(b).isprintable() else next(spare) for b in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# GPT-2 cuts text by 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ into pieces.
# Python's re has no \p, but its \w is just L, N and "_", and its \d is Nd: NUM stands for the rest of N. Its
# \s has U+001C to U+001F, which are no spaces. No word has 1,000 letters, and to merge a million takes hours.
GPT2_PATTERN = (r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_NUM]+| ?[\dNUM]+| ?(?:[^\w\s]|[_\x1c-\x1f])+"
                r"|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]+").replace("+", "{1,1000}")
COSMO2_PATTERN = r"[\dNUM]|[^\S\x1c-\x1f]{1,1000}(?=[\dNUM])|" + GPT2_PATTERN  # each digit for itself

# How tokenizer.json says which of the two it is, and the other keys that may have a value in it.
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
COSMO2 = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
PLAIN_KEYS = {"type", "unk_token", "vocab", "merges", "id", "content", "special", "normalized"}

def pieces(text, pattern=GPT2_PATTERN):
    """The pieces of a text, a list of str."""
    characters = set() if text.isascii() else set(text)  # ASCII has no such numbers
    numbers = sorted(c for c in characters if unicodedata.category(c) in ("No", "Nl"))
    return re.findall(pattern.replace("NUM", "".join(numbers)), text)

class Tokenizer:
    """Byte-level BPE from the content of a tokenizer.json; DataError if it may give other ids here than in
    the `tokenizers` library. Inside, the token i is the character chr(i). vocab_size: 1 + the largest id."""
    def __init__(self, spec):
        model, added = spec["model"], spec["added_tokens"]
        self.spec = spec
        self.special = {token["content"]: token["id"] for token in added}
        vocab = model["vocab"] | self.special
        self.vocab_size = max(vocab.values()) + 1
        self.eot = vocab[EOT]
        odd = {key for part in [model, *added] for key in part if part[key]} - PLAIN_KEYS
        known = model["type"] == "BPE" and spec["pre_tokenizer"] in (GPT2, COSMO2)
        if odd or not known or spec.get("normalizer") or self.vocab_size > 65536:
            raise DataError("only BPE in the form of GPT-2's or cosmo2's, with 16-bit ids, is supported")
        self.pattern = GPT2_PATTERN if spec["pre_tokenizer"] == GPT2 else COSMO2_PATTERN
        self.bytes = [b""] * self.vocab_size  # of each id
        for token, i in vocab.items():
            self.bytes[i] = bytes(map(CHAR_TO_BYTE.get, token))
        symbol = {token: chr(i) for token, i in vocab.items()}
        unknown = symbol.get(model.get("unk_token"))  # None: a byte that is no token is left out
        self.byte_symbols = {byte: symbol.get(char, unknown) for byte, char in BYTE_TO_CHAR.items()}
        self.merges = {}  # {two symbols: (rank, the one that takes their place)}
        for pair in model["merges"]:
            a, b = pair.split(" ") if isinstance(pair, str) else pair
            self.merges[symbol[a] + symbol[b]] = len(self.merges), symbol[a + b]
        longest_first = sorted(map(re.escape, self.special), key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(longest_first)})").split
        self.merged = lru_cache(1 << 18)(self.merge)  # bounded: a huge corpus has no end of rare pieces

    @classmethod
    def load(cls, path):
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except Exception as e:  # anything may be wrong with a file made elsewhere
            raise DataError(f"{path} is no tokenizer.json that can be used ({e!r}): replace it") from None

    def merge(self, piece):
        """One piece: its bytes, in which the pair that was learnt first is merged until none is left."""
        word = piece.encode().decode("latin-1").translate(self.byte_symbols)
        while known := self.merges.keys() & map(add, word, word[1:]):
            first = min(known, key=self.merges.get)
            word = word.replace(first, self.merges[first][1])
        return word

    def encode_str(self, text):
        """The ids of a text as the characters of a str."""
        out = []
        for part in self.split(text):
            if part in self.special:
                out.append(chr(self.special[part]))
            else:
                out.extend(map(self.merged, pieces(part, self.pattern)))
        return "".join(out)

    def encode(self, text):
        return list(map(ord, self.encode_str(text)))

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")

def train_bpe(piece_counts, vocab_size):
    """Learn merges from {piece: how often}, until there are vocab_size tokens or no pair occurs twice. The
    most frequent pair goes first; of equals the one with the lower ids, as in the `tokenizers` library. An
    index tells which words may hold a pair, so that a merge costs no more than what it changes."""
    tokens = [EOT, *sorted(CHAR_TO_BYTE)]
    symbols = {byte: chr(tokens.index(char)) for byte, char in BYTE_TO_CHAR.items()}
    frequency = list(piece_counts.values())
    words = [""] * len(frequency)
    counts = Counter()  # of each pair
    places = defaultdict(list)  # the words that hold it, or did
    changed = set()  # pairs whose counts are not in the queue

    def rewrite(i, word, new=None):  # new: the merged symbol; None on first reading
        n = frequency[i]
        for pair in map(add, words[i], words[i][1:]):
            counts[pair] -= n
        for pair in map(add, word, word[1:]):
            counts[pair] += n
            if new is None or new in pair:
                places[pair].append(i)
                changed.add(pair)
        words[i] = word

    for i, piece in enumerate(piece_counts):
        rewrite(i, piece.encode().decode("latin-1").translate(symbols))
    queue = [(0, "")]  # the last to go, when no pair is left
    merges = []
    while len(tokens) < vocab_size:
        for pair in changed:
            heappush(queue, (-counts[pair], pair))
        changed.clear()
        negative, pair = heappop(queue)
        if -negative != counts[pair]:  # it has fallen since this entry was made
            changed.add(pair)
            continue
        if counts[pair] < 2:
            break
        a, b = (tokens[ord(symbol)] for symbol in pair)
        merges.append(f"{a} {b}")
        new = chr(len(tokens))
        tokens.append(a + b)
        for i in places.pop(pair):
            if pair in words[i]:  # no earlier merge took it
                rewrite(i, words[i].replace(pair, new), new)
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    eot = {"id": 0, "content": EOT, "special": True, **flags}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return Tokenizer(dict(version="1.0", added_tokens=[eot], pre_tokenizer=GPT2, decoder=GPT2, model=model))

# Corpora: which files hold the text ---------------------------------------------------------------

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
ROWS = HUB.replace("://", "://datasets-server.")
REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"  # of TinyStories: a revision never changes

def receive(url, file, n_bytes):
    """Append what one answer brings of the first n_bytes. ConnectionError: that was not all of it."""
    request = Request(url, headers={"User-Agent": "nanoLR", "Range": f"bytes={file.tell()}-{n_bytes - 1}"})
    token = re.sub("[^!-~]", "", os.environ.get("HF_TOKEN", ""))  # an error would show one with a line break
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # goes to no other host
    with urlopen(request, timeout=30) as response:
        if response.status != 206:  # a server that ignores Range sends it all
            file.seek(file.truncate(0))
        while chunk := response.read(1 << 18):
            if b"\0" in chunk or not file.tell() and re.match(rb"\s*<[!?a-zA-Z]", chunk):
                raise ValueError("it sent a web page or binary data in place of text")
            file.write(chunk)
        if response.length:
            raise ConnectionError(f"{response.length:,} bytes of the answer are missing")

def download(url, path, n_bytes=10**15):
    """Fetch a text file, or its first n_bytes, unless it is there, fetched or put there by hand. It arrives
    in path.part, whose length says where to go on, and gets its name when it is complete. Returns path."""
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    failures = 0
    with open(part, "ab") as raw, tqdm.wrapattr(raw, "write", desc=path.name, disable=None) as file:
        while file.tell() < n_bytes:
            have = file.tell()
            try:
                receive(url, file, n_bytes)
                break
            except (URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as e:
                failures = 1 if file.tell() > have else failures + 1
                status = getattr(e, "code", 500 if file.tell() else 400)  # no network, if nothing ever came
                passing = status >= 500 or status in (408, 416, 429)
                if failures > 5 or not passing or isinstance(e, ValueError):
                    raise DataError(f"cannot fetch {path.name} from {url} ({e}): put it at {path} by hand, "
                                    "or use --data stdlib, which needs no network") from None
                if status == 416:  # what is here is longer than the file
                    file.seek(file.truncate(0))
                time.sleep(2**failures)
    return part.replace(path)

def tinystories(folder, megabytes, vocab_size):
    """Short stories in the words of small children (Eldan & Li 2023), as GPT-4 wrote them: 2.2 GB."""
    url = f"{HUB}/datasets/roneneldan/TinyStories/resolve/{REVISION}/TinyStoriesV2-GPT4"
    val = download(f"{url}-valid.txt", folder / "TinyStoriesV2-GPT4-valid.txt")
    train = folder / f"TinyStoriesV2-GPT4-train-{megabytes}MB.txt"
    download(f"{url}-train.txt", train, megabytes << 20)
    return [train], [val], None

def cosmopedia(folder, megabytes, vocab_size):
    """Synthetic textbooks and posts (Ben Allal et al. 2024); the published tokenizer, if of that size."""
    text, tokenizer = "", None
    if vocab_size == 49_152:
        published = f"{HUB}/HuggingFaceTB/cosmo2-tokenizer/resolve/main/tokenizer.json"
        tokenizer = Tokenizer.load(download(published, folder / "cosmo2-tokenizer.json"))
    url = f"{ROWS}/rows?dataset=HuggingFaceTB%2Fsmollm-corpus&config=cosmopedia-v2&split=train&length=100"
    for offset in range(0, 10**9, 100):
        page = download(f"{url}&offset={offset}", folder / f"cosmopedia-v2-rows-{offset}.json")
        try:
            rows = [row["row"]["text"] or "" for row in json.loads(page.read_bytes())["rows"]]
            text += EOT.join([*rows, ""])
        except Exception as e:
            page.unlink()
            raise DataError(f"{ROWS} sent no rows of text ({e!r}): try again, or use --data stdlib") from None
        if len(rows) < 100 or len(text) > megabytes << 20:
            break
    path = folder / f"cosmopedia-v2-{megabytes}MB.txt"
    write_aside(path, text.encode(errors="replace"))
    return [path], [], tokenizer

NETWORK = {"tinystories": tinystories, "cosmopedia": cosmopedia}  # -> files, validation files, tokenizer

def files_of(name, cache):
    """The sorted paths of a text file, of the files in a folder, or of the standard library's source."""
    root = os.path.abspath(name) if name else name
    suffix, skip = "", r"\..*|__pycache__"
    if name == "stdlib":
        root, suffix = os.path.dirname(os.__file__), ".py"
        skip += "|tests?|idle_test|(site|dist)-packages"
    found = [root]
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if not re.fullmatch(skip, d) and Path(folder, d) != cache]
        found += [os.path.join(folder, name) for name in names if name.endswith(suffix) and name[0] != "."]
    found = sorted(filter(os.path.isfile, found))
    if not found:
        raise DataError(f"unknown corpus '{name}': use stdlib, tinystories, cosmopedia or a path with text")
    return found

# Preparing: documents go to one process a core ----------------------------------------------------

def read(files):
    """(documents, files that are no UTF-8 text). A document is what stands between <|endoftext|>, or a file.
    A lone file without it is cut at ends of lines: its validation side is neighbours of training text."""
    documents, skipped = [], []
    for path in files:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read(1 << 20)
                if "\0" in text:  # do not read on: it may be huge
                    raise ValueError("binary")
                text += file.read()
        except (OSError, ValueError):
            skipped.append(path)
            continue
        if EOT in text:
            documents += map(str.strip, text.split(EOT))
        elif len(files) > 1:
            documents.append(text)
        else:
            size = min(max(len(text) // 64, 128), 8192)
            documents += re.findall(rf"(?s).{{1,{size}}}(?:(?<=\n)|\Z)|.{{1,{size}}}", text)
    return list(filter(None, documents)), skipped

def choose_validation(documents):
    """The documents to validate on: the lowest hashes, until they have 5% of the bytes (10% of few). So equal
    documents are on the same side. A document larger than all that stays out."""
    hashes = {d: hashlib.blake2b(d.encode(), digest_size=8).digest()[::-1] for d in documents}
    sizes = [len(document.encode()) for document in documents]
    target = max(sum(sizes) // 20, min(sum(sizes) // 10, 1 << 16))
    largest = max(target, min(sizes, default=0))
    chosen, n_bytes = set(), 0
    for document in sorted(documents, key=hashes.get):
        size = len(document.encode())
        if n_bytes < target and size <= largest:
            chosen.add(document)
            n_bytes += size
    return [document for document in documents if document in chosen]

def count(batch):
    """How often each piece occurs in some documents."""
    return Counter(chain.from_iterable(map(pieces, batch)))

load_tokenizer = lru_cache(1)(Tokenizer.load)  # once in each process

def encode(batch, tokenizer_path):
    """The ids of some documents, as little-endian uint16."""
    ids = load_tokenizer(tokenizer_path).encode_str(EOT.join([*batch, ""]))
    return ids.encode("utf-16-le", "surrogatepass")

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle, and its death for all
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()

def parallel(pool, work, documents, title):
    """Iterate over work(32 documents) for all of them, in their order, with a bar."""
    batches = [documents[i:i + 32] for i in range(0, len(documents), 32)]
    return tqdm(pool.map(work, batches), title, len(batches), disable=None)

def prepare(files, val_files, tokenizer, vocab_size, folder):
    """Make tokenizer.json, train.bin and val.bin in a folder. val_files, tokenizer: what comes with a corpus;
    where nothing does, some documents are held out and the vocabulary is learnt."""
    documents, skipped = read(files)
    val = read(val_files)[0] or choose_validation(documents)
    held_out = set(val)
    train = [document for document in documents if document not in held_out]
    if not train or not val:
        no_text = f" (no UTF-8 text: {skipped[:3]})" if skipped else ""
        raise DataError(f"{folder.name} needs two different documents{no_text}")
    if skipped:
        print(f"left out, as they are no UTF-8 text: {len(skipped)} files: {skipped[0]} ...", file=sys.stderr)
    with ProcessPoolExecutor(min(cores(), 16), initializer=start_worker) as pool:
        if tokenizer is None:
            counts = Counter()
            for part in parallel(pool, count, train, "counting"):
                counts.update(part)
            tokenizer = train_bpe(counts, vocab_size)
            if tokenizer.vocab_size < vocab_size:
                print(f"the text gives {tokenizer.vocab_size:,} of {vocab_size:,} tokens", file=sys.stderr)
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(tokenizer.spec, ensure_ascii=False, indent=1), encoding="utf-8")
        for name, documents in ("train.bin", train), ("val.bin", val):
            with open(folder / name, "wb") as file:
                file.writelines(parallel(pool, partial(encode, tokenizer_path=path), documents, name))

# Loading: a prepared corpus, its batches and its validation windows -------------------------------

def count_tokens(tokens, vocab_size):
    """(vocab_size,) how often each id occurs; a part at a time, as bincount makes int64 of it."""
    parts = np.array_split(tokens, len(tokens) // 10**6 + 1)
    return sum(np.bincount(part, minlength=vocab_size) for part in parts)

class Corpus:
    """What is in a prepared folder: tokenizer, train and val ((n,) uint16 ids, mapped from the files),
    token_bytes ((vocab_size,), how many an id stands for, 0 for <|endoftext|>), and meta, counted anew."""
    def __init__(self, folder, label):
        path = folder / "tokenizer.json"
        self.folder = folder
        self.tokenizer = Tokenizer.load(path)
        self.token_bytes = np.array(list(map(len, self.tokenizer.bytes)))
        self.token_bytes[self.tokenizer.eot] = 0
        self.train = np.memmap(folder / "train.bin", "<u2", "r")
        self.val = np.memmap(folder / "val.bin", "<u2", "r")
        self.meta = {"corpus": label, "vocab_size": self.tokenizer.vocab_size}
        self.meta["tokenizer_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        for side, tokens in ("train", self.train), ("val", self.val):
            self.meta[f"{side}_bytes"] = int(count_tokens(tokens, len(self.token_bytes)) @ self.token_bytes)
            self.meta[f"{side}_tokens"] = len(tokens)
            self.meta[f"{side}_sha256"] = hashlib.sha256(tokens).hexdigest()

def load(name, vocab_size, n_tokens=1_000_000, cache="data"):
    """The corpus `name` (stdlib, tinystories, cosmopedia or a path) with at most vocab_size tokens, prepared
    under `cache` unless it is there. Fetches no more than n_tokens need. DataError: for the user to mend."""
    if not 257 <= vocab_size <= 65536:
        raise DataError(f"a vocabulary of {vocab_size:,} is not possible: use 257 (bytes, {EOT}) to 65,536")
    cache = Path(os.path.abspath(cache))
    try:
        if name in NETWORK:
            # 5 bytes a token; to two digits, so that runs of nearly the same budget share a folder.
            megabytes = int(float(f"{n_tokens * 5 / 2**20 + 1:.1e}"))
            label, content = f"{name}-{megabytes}MB", REVISION
        else:
            sources = files_of(name, cache), [], None
            label = os.path.basename(os.path.abspath(name))[:100]
            content = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in sources[0]]
        source = hashlib.sha256(repr(content).encode()).hexdigest()[:8]
        folder = cache / f"{label}-{source}-{vocab_size}"
        meta = folder / "meta.json"
        with lock(folder, wait=True):  # of several processes one prepares it
            with suppress(Exception):  # whatever is missing or damaged, it is made anew
                corpus = Corpus(folder, label)
                if corpus.meta == json.loads(meta.read_bytes()):
                    return corpus
            if name in NETWORK:
                with lock(cache / "downloads", wait=True):
                    sources = NETWORK[name](cache / "downloads", megabytes, vocab_size)
            prepare(*sources, vocab_size, folder)
            corpus = Corpus(folder, label)
            meta.write_text(json.dumps(corpus.meta, indent=1))  # the last file: without it there is no corpus
            return corpus
    except (BrokenExecutor, MemoryError):
        raise DataError("a process that prepared the text was killed, or ran out of memory") from None
    except OSError as e:
        raise DataError(f"cannot use {cache}, which must be a folder to write to: {e}") from None

def write_aside(path, content):
    """Under another name first: a reader, or a machine that stops here, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as e:  # a full disk says no name
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)

def lock(folder, wait=False):
    """Own a folder until the file that this returns is closed, or this process ends, however it ends. Another
    owner is waited for (wait), or named in a DataError."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a+")
    if os.name != "nt":  # Windows has no fcntl: there nobody is kept out
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(f"{folder} is in use by process {file.read()}: wait, or stop it") from None
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file

def windows(tokens, context_length):
    """(len(tokens) - context_length, context_length + 1): every window, as a view."""
    if len(tokens) <= context_length:
        raise DataError(f"only {len(tokens):,} tokens: use --context-length {len(tokens) - 1} or less")
    return np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)

def inputs_and_targets(chosen):
    """x, y: (B, T) int64 tensors on the CPU from windows (B, T + 1), y one token later."""
    import torch  # not on top: the processes that prepare a corpus need none
    both = torch.from_numpy(chosen.astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

def get_batch(tokens, batch_size, context_length, seed, step):
    """x, y: (batch_size, context_length) int64, drawn by a counter-based generator (Philox, Salmon et al.
    2011) with the key (seed, step): every rate sees the same batches, and resuming needs no state of it."""
    every = windows(tokens, context_length)
    random = np.random.Generator(np.random.Philox(key=seed % 2**64 + (step << 64)))
    return inputs_and_targets(every[random.integers(0, len(every), batch_size)])

def val_windows(tokens, context_length, max_tokens):
    """x, y: (W, context_length) int64: always the same windows, evenly spread and apart; W >= 1."""
    apart = windows(tokens, context_length)[::context_length]
    n = min(max(max_tokens // context_length, 1), len(apart))
    return inputs_and_targets(apart[np.arange(n) * len(apart) // n])

# python data.py NAME ------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus and show what a model will see.")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")  # one line, without the usage
    parser.add_argument("name", nargs="?", default="stdlib", help="stdlib, tinystories, cosmopedia or a path")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=float, default=1e6, help="to fetch from the network (default: 1e6)")
    parser.add_argument("--cache", default="data", help="folder of prepared corpora (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.tokens <= 1e12:
        parser.error(f"--tokens {args.tokens:g}: use a number from 1 to 1e12")
    try:
        corpus = load(args.name, args.vocab_size, int(args.tokens), args.cache)
        p = count_tokens(corpus.train, len(corpus.token_bytes)) / len(corpus.train)
        bytes_per_token = p @ corpus.token_bytes
        bits_per_byte = -p @ np.log2(p + 1e-30) / bytes_per_token
        (sys.stdout or sys.stderr).reconfigure(errors="backslashreplace")  # show any token in any locale
        print(f"{corpus.folder}: a vocabulary of {len(p):,}, {len(corpus.train):,} tokens of text, "
              f"{len(corpus.val):,} to validate on, {bytes_per_token:.2f} bytes a token")
        print(f"Knowing only how often each token occurs: {bits_per_byte:.3f} bits a byte. Models do better.")
        print("The validation text begins (| between tokens):")
        print("|".join(corpus.tokenizer.decode([i]) for i in corpus.val[:150]), flush=True)
    except (DataError, OSError) as e:  # OSError: who read the lines has gone (| head), or a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be written
        parser.error(e)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a traceback; the workers follow
    main()
