"""Text in, batches of token ids out.

A corpus is a list of documents. Those with the lowest hashes, 5% of the bytes, are for validation; byte pair
encoding (BPE; Sennrich et al. 2016, on bytes Radford et al. 2019) is trained on the others. It starts from
the 256 bytes, and again and again makes the most frequent pair of neighbours a new token. Merges never cross
a piece, such as a word with its leading space: equal pieces are counted and merged once. The ids are those
of Hugging Face's `tokenizers`, but for pieces of over 1,000 characters and letters newer than this Python.

    python data.py stdlib                         # the running Python's own library: no network
    python data.py my.txt --vocab-size 1000       # or .jsonl with a "text" a line, or a folder of files
    python data.py tinystories --tokens 40000000  # from the Hugging Face hub, as much as so many tokens need
"""
import argparse
import codecs
import csv
import hashlib
import io
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
from heapq import heapify, heappop, heappush
from itertools import chain
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

EOT = "<|endoftext|>"
progress = partial(tqdm, disable=None if sys.stderr else True)  # None: a bar only on a terminal

class DataError(ValueError):
    """One line for the user: what is wrong, with which value, and what to do."""

def say(line, file=None, end="\n"):
    """Print a line, whatever the console: what it cannot show is escaped, one that is gone gets nothing."""
    file = file or sys.stdout
    try:
        encoding = file.encoding or "utf-8"
        print(str(line).encode(encoding, "backslashreplace").decode(encoding), file=file, end=end, flush=True)
    except Exception:
        with suppress(Exception):  # what is left in its buffer goes nowhere, or Python ends with status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
say_once = lru_cache(say)

# Tokenizer: text to ids and back ------------------------------------------------------------------
# GPT-2 writes each byte as a printable character: its own of Latin-1 or, where that has none, U+0100 and on.
spare = map(chr, range(256, 512))
BYTE_TO_CHAR = [chr(b) if b > 32 and chr(b).isprintable() else next(spare) for b in range(256)]
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}

# What a tokenizer.json may hold: pieces as in GPT-2 (older files name no regex), or each digit for itself.
OLD = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2 = {**OLD, "use_regex": True}
COSMO2 = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
ALLOWED = {"pre_tokenizer": [OLD, GPT2, COSMO2], "type": ["BPE"]}
ANY = "version model vocab merges unk_token added_tokens id content special normalized decoder post_processor"

# GPT-2's 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ as Python has it: \w is
# L, N and "_", \d is N but for NUMBERS, \s has U+001C to U+001F, too. A piece has up to 1,000 characters.
PATTERN = (r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_NUMBERS]{1,1000}| ?[\dNUMBERS]{1,1000}| ?(?:[^\w\s]|[_\x1c-\x1f])"
           r"{1,1000}|[^\S\x1c-\x1f]{1,1000}(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]{1,1000}")
DIGITS = r"[\dNUMBERS]|[^\S\x1c-\x1f]{1,1000}(?=[\dNUMBERS])|"

def pieces(text, single_digits=False):
    """A list of str: words and numbers with the space before them, signs, spaces."""
    rare = set("" if text.isascii() else text)
    numbers = "".join(sorted(c for c in rare if unicodedata.category(c) in ("No", "Nl")))
    return re.findall((DIGITS * single_digits + PATTERN).replace("NUMBERS", numbers), text)

class Tokenizer:
    """Byte-level BPE from the content of a tokenizer.json. vocab_size: 1 + the largest id. DataError, which
    names the part, where the `tokenizers` library could give other ids."""
    def __init__(self, spec):
        self.spec, model, added = spec, spec["model"], spec["added_tokens"]
        for part in [spec, model, *added]:
            for key in part:
                if key not in ANY.split() and part[key] not in ALLOWED.get(key, [None, False, ""]):
                    raise DataError(f"its {key} may give other ids here")
        self.special = {token["content"]: token["id"] for token in added if token["content"]}
        self.single_digits = spec["pre_tokenizer"] == COSMO2
        self.split = re.compile(f"({'|'.join(map(re.escape, sorted(self.special, reverse=True)))})").split
        self.eot = self.special[EOT]
        vocab = model["vocab"] | self.special
        self.vocab_size = max(vocab.values()) + 1
        self.bytes = [b""] * self.vocab_size  # of each id
        for token, i in vocab.items():
            self.bytes[i] = bytes(map(CHAR_TO_BYTE.get, token))
        unknown = vocab.get(model.get("unk_token"))  # None: a byte that is no token is left out
        self.byte_ids = [vocab.get(char, unknown) for char in BYTE_TO_CHAR]
        self.ranks, self.merged_ids, used = {}, [], set()  # of a pair of ids, of a rank
        for merge in model["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            self.ranks[vocab[first], vocab[second]] = len(self.merged_ids)
            self.merged_ids.append(vocab[first + second])
            used |= {first, second}
            if first + second in used:
                raise DataError("its merges are out of order: one comes before what it is made of")
        self.encode_piece = lru_cache(1 << 18)(self.merge)  # bounded: there is no end of rare pieces

    @classmethod
    def load(cls, path):
        try:
            return cls(json.loads(Path(path).read_bytes()))
        except Exception as e:  # anything may be wrong with a file made elsewhere
            raise DataError(f"{path} is no tokenizer.json that can be used ({e!r}): replace it") from None

    def ranks_of(self, ids):
        """For each pair of neighbours, how many merges were learnt before theirs."""
        return [self.ranks.get(pair, len(self.merged_ids)) for pair in zip(ids, ids[1:])]

    def merge(self, piece):
        """One piece: its bytes, in which the pair that was learnt first is merged until none is left."""
        ids = [self.byte_ids[byte] for byte in piece.encode() if self.byte_ids[byte] is not None]
        ranks = self.ranks_of(ids)
        while (rank := min(ranks, default=len(self.merged_ids))) < len(self.merged_ids):
            i = 0
            while rank in ranks[i:]:
                i = ranks.index(rank, i)
                ids[i:i + 2] = [self.merged_ids[rank]]
                before = max(i - 1, 0)
                ranks[before:i + 2] = self.ranks_of(ids[before:i + 2])  # of the pairs with its neighbours
        return ids

    def encode(self, text):
        ids = []
        for part in self.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += chain.from_iterable(map(self.encode_piece, pieces(part, self.single_digits)))
        return ids

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode(errors="replace")

def places(pair, word):
    """Where a pair of neighbours stands in a word, from the left. It may be merged there on the way."""
    i = -1
    with suppress(ValueError):  # its first is nowhere else
        while True:
            i = word.index(pair[0], i + 1)
            if word[i + 1] == pair[1]:
                yield i

def train_bpe(piece_counts, vocab_size):
    """Learn merges from {piece: how often}, until there are vocab_size tokens or no pair occurs twice. Of
    equally frequent pairs the one with the lower ids goes first, as in the `tokenizers` library."""
    tokens = [EOT, *sorted(CHAR_TO_BYTE)]
    byte_ids = [tokens.index(char) for char in BYTE_TO_CHAR]
    words = [[-1, *map(byte_ids.__getitem__, piece.encode()), -1] for piece in piece_counts]  # -1: its ends
    frequency = list(piece_counts.values())
    counts = Counter()  # of each pair
    holders = defaultdict(list)  # the words in which it stands, or stood
    for i, word in enumerate(words):
        for pair in zip(word[1:-1], word[2:-1]):
            counts[pair] += frequency[i]
            holders[pair].append(i)
    queue = [(-n, pair) for pair, n in counts.items()]
    heapify(queue)
    merges = []
    for new in progress(range(len(tokens), vocab_size), "merging"):
        # The most frequent pair: the first in the queue whose count is still right.
        while queue and -queue[0][0] != counts[queue[0][1]]:
            heappop(queue)
        if not queue or queue[0][0] > -2:
            break
        pair = first, second = heappop(queue)[1]
        merges.append(f"{tokens[first]} {tokens[second]}")
        tokens.append(tokens[first] + tokens[second])
        # Merge it where it stands: the pairs with its neighbours go, those of the new token come.
        changed = set()
        for holder in set(holders.pop(pair)):
            word = words[holder]
            for i in places(pair, word):
                left, right = word[i - 1], word[i + 2]
                word[i:i + 2] = [new]
                for gone, come in ((left, first), (left, new)), ((second, right), (new, right)):
                    if -1 not in come:
                        counts[gone] -= frequency[holder]
                        counts[come] += frequency[holder]
                        holders[come].append(holder)
                        changed |= {gone, come}
        del counts[pair]
        for pair in changed:
            heappush(queue, (-counts[pair], pair))
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    eot = {"id": 0, "content": EOT, "special": True, **flags}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return Tokenizer(dict(version="1.0", added_tokens=[eot], pre_tokenizer=GPT2, decoder=GPT2, model=model))

# Corpora: their documents, those for validation or [], their tokenizer or None --------------------
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")  # or a mirror of it
ROWS = os.environ.get("HF_ROWS_ENDPOINT", "https://datasets-server.huggingface.co").rstrip("/")
REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"  # of TinyStories: a revision never changes

def receive(url, part, n_bytes):
    """Append to a file what one answer brings of the first n_bytes. ConnectionError: that was not all."""
    with open(part, "ab") as file, progress(desc=part.stem, unit="B", unit_scale=True) as bar:
        headers = {"User-Agent": "nanoLR", "Range": f"bytes={file.tell()}-{n_bytes - 1}"}
        with urlopen(Request(url, headers=headers), timeout=30) as response:
            if response.status != 206:  # a server that ignores Range starts from the beginning
                file.seek(file.truncate(0))
            while chunk := response.read(min(1 << 18, n_bytes - file.tell())):
                bar.update(file.write(chunk))
            if response.length and file.tell() < n_bytes:
                raise ConnectionError(f"{response.length:,} bytes of the answer are missing")

def download(url, path, n_bytes=10**15):
    """Fetch a file, or its first n_bytes, unless it is there. After a break the next run goes on."""
    part = path.with_name(path.name + ".part")
    with lock(path.parent, wait=True):  # of several processes one fetches it
        while not path.exists():
            try:
                receive(url, part, n_bytes)
                part.replace(path)
            except Exception as e:  # anything can go wrong in a network
                wait = 0
                if getattr(e, "code", 0) == 429:  # too many requests; it says `60` or `"api";r=0;t=60`
                    said = re.findall(r"(?mi)^(?:Retry-After|RateLimit): .*?(\d+)$", str(e.headers))
                    wait = max(1, int([*said, 300][0]))
                    e = f"limited, run again in {wait} s"
                if not 0 < wait < 300:
                    raise DataError(f"cannot fetch {path.name} from {url} ({e}): run again, put it at {path} "
                                    "by hand, or use --data stdlib") from None
                say(f"{path.name}: too many requests; going on in {wait} s", sys.stderr)
                time.sleep(wait)
    return path

def tinystories(folder, megabytes, vocab_size):
    """Short stories in the words of small children (Eldan & Li 2023), as GPT-4 wrote them: 2.2 GB."""
    url = f"{HUB}/datasets/roneneldan/TinyStories/resolve/{REVISION}/TinyStoriesV2-GPT4"
    val = download(url + "-valid.txt", folder / "TinyStoriesV2-GPT4-valid.txt")
    path = folder / f"TinyStoriesV2-GPT4-train-{megabytes}MB.txt"
    train = download(url + "-train.txt", path, megabytes << 20)
    whole = train.read_text("utf-8", "ignore").rpartition(EOT)[0]  # what follows may be half a story
    return documents_in(whole), documents_in(val.read_text("utf-8", "ignore")), None

def cosmopedia(folder, megabytes, vocab_size):
    """Synthetic textbooks and posts (Ben Allal et al. 2024); the published tokenizer, if of that size."""
    text, tokenizer = "", None
    if vocab_size == 49_152:
        url = HUB + "/HuggingFaceTB/cosmo2-tokenizer/resolve/main/tokenizer.json"
        tokenizer = Tokenizer.load(download(url, folder / "cosmo2-tokenizer.json"))
    say(f"about {3 * megabytes + 1} requests, less what is here; 500 in 5 minutes are allowed", sys.stderr)
    url = ROWS + "/rows?dataset=HuggingFaceTB%2Fsmollm-corpus&config=cosmopedia-v2&split=train&length=100"
    for offset in range(0, 10**9, 100):
        page = download(f"{url}&offset={offset}", folder / f"cosmopedia-v2-rows-{offset}.json")
        rows = json.loads(page.read_bytes())["rows"]
        text += "".join(row["row"]["text"] + EOT for row in rows)
        if len(rows) < 100 or len(text) > megabytes << 20:
            break
    return documents_in(text), [], tokenizer
NETWORK = {"tinystories": tinystories, "cosmopedia": cosmopedia}

def files_of(name):
    """The sorted paths of a text file, of the files in a folder, or of the standard library's source."""
    root, suffix, skip = os.path.abspath(name or " "), "", r"\..*|__pycache__|runs|.*\.(log|out)"
    if name == "stdlib":
        root, suffix = os.path.dirname(os.__file__), ".py"
        skip += "|tests?|idle_test|(site|dist)-packages"
    is_text, paths = re.compile(rf"(?s)(?!({skip})\Z).*").fullmatch, [root]
    for folder, subfolders, names in os.walk(root):
        if ".lock" in names:  # made by these programs
            names = subfolders[:] = []
        subfolders[:] = filter(is_text, subfolders)
        for link in filter(os.path.islink, [os.path.join(folder, name) for name in subfolders]):
            say_once(f"not followed: {link!r} is a link to a folder", sys.stderr)
        paths += [os.path.join(folder, name) for name in filter(is_text, names)]
    found = sorted(path for path in paths if path.endswith(suffix) and os.path.isfile(path))
    if not found:
        raise DataError(f"unknown corpus {name!r}: use stdlib, tinystories, cosmopedia or a path with text")
    return found

def documents_in(text):
    """What stands between <|endoftext|>, in one form, so that copies are equal."""
    text = text.encode("utf-8", "replace").decode().replace("\ufeff", "")  # JSON can hold lone surrogates
    return list(filter(None, map(str.strip, text.replace("\r\n", "\n").split(EOT))))

def read_all(files):
    """The documents of all files. A lone one is cut at ends of lines, so that some can be held out."""
    documents, left_out = [], []
    for path in files:
        try:  # an incremental decoder drops half a character at the end of a file that was cut
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(Path(path).read_bytes())
            if "\0" in text:
                raise ValueError("binary")
            if path.endswith(".jsonl"):
                rows = [json.loads(line) for line in text.split("\n") if line.strip().endswith("}")]
                text = EOT.join(row.get("text") or "" for row in rows)
            documents += documents_in(text)
        except Exception:  # also: no right to read it, larger than the memory
            left_out.append(path)
    if left_out:
        line = (f"no UTF-8 text: {len(left_out)} files, such as {left_out[:1]} (gunzip a .gz; "
                "iconv -f UTF-16 or -f LATIN1 -t UTF-8 converts others)")
        if not documents:
            raise DataError(line)
        say("left out: " + line, sys.stderr)
    if len(documents) == 1:
        size = min(max(len(documents[0]) // 64, 128), 8192)
        cut = re.findall(rf"(?s).{{1,{size}}}(?<=\n)|.{{1,{size}}}", *documents)
        documents = documents_in(EOT.join(cut))
    return documents, [], None

# Preparing: documents go to one process a core ----------------------------------------------------
def choose_validation(documents):
    """The set of documents to validate on: of the lowest hashes, those that fit into 5% of the bytes."""
    sizes = {document: len(document.encode()) for document in documents}
    chosen, room = set(), sum(sizes.values()) // 20
    for document in sorted(sizes, key=lambda document: hashlib.blake2b(document.encode()).digest()):
        if sizes[document] <= room:
            chosen.add(document)
            room -= sizes[document]
    return chosen or set(sorted(sizes, key=sizes.get)[:1])  # of a few large ones the smallest

def count(batch):  # how often each piece occurs in some documents
    return Counter(chain.from_iterable(map(pieces, batch)))

load_tokenizer = lru_cache(1)(Tokenizer.load)  # once in each process
def encode(batch, tokenizer_path):  # the ids of some documents, as little-endian uint16
    return np.array(load_tokenizer(tokenizer_path).encode(EOT.join([*batch, ""])), "<u2").tobytes()

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def start_worker():  # Ctrl-C is for the parent to handle; its end, however it comes, is its workers' end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()

def parallel(work, documents, title):
    """What work gives for each batch of documents, in their order, with a bar."""
    batches = [documents[i:i + 50] for i in range(0, len(documents), 50)]
    pool = ProcessPoolExecutor(min(cores(), 16), initializer=start_worker)
    try:
        yield from progress(pool.map(work, batches), title, len(batches))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nobody waits for the rest

def prepare(documents, val, tokenizer, vocab_size, folder, label):
    """Fill a folder. Without val, documents are held out; without a tokenizer, one is trained."""
    held_out = set(val) or choose_validation(documents)
    train = [document for document in documents if document not in held_out]
    val = val or [document for document in documents if document in held_out]
    if not train or not val:
        raise DataError(f"{label} needs two different documents of UTF-8 text")
    if not tokenizer:
        counts = Counter()
        for part in parallel(count, train, "counting"):
            counts.update(part)
        tokenizer = train_bpe(counts, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        say(f"the text gives {tokenizer.vocab_size} of {vocab_size} tokens", sys.stderr)
    path = folder / "tokenizer.json"
    write_json(path, tokenizer.spec)
    meta = {"corpus": label, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": sha256(path)}
    for side, documents in ("train", train), ("val", val):
        ids = b"".join(parallel(partial(encode, tokenizer_path=path), documents, side))
        write_aside(folder / f"{side}.bin", ids)
        meta[f"{side}_bytes"] = sum(len(document.encode()) for document in documents)
        meta[f"{side}_tokens"] = len(ids) // 2
        meta[f"{side}_sha256"] = sha256(folder / f"{side}.bin")
    write_json(folder / "meta.json", meta)  # the last: without it, no corpus

# Loading: a prepared corpus, its batches and its validation windows -------------------------------
def sha256(path):
    return hashlib.sha256(np.memmap(path, "u1", "r")).hexdigest()

class Corpus:
    """A prepared folder: tokenizer, train and val ((n,) uint16 ids, mapped from the files), token_bytes
    ((vocab_size,), how many an id stands for, 0 for <|endoftext|>), and meta."""
    def __init__(self, folder):
        self.folder, self.meta = folder, json.loads((folder / "meta.json").read_bytes())
        for file in "tokenizer.json", "train.bin", "val.bin":
            if sha256(folder / file) != self.meta[f"{Path(file).stem}_sha256"]:
                raise DataError(f"{folder / file} is damaged")
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.token_bytes = np.array(list(map(len, self.tokenizer.bytes)))
        self.token_bytes[self.tokenizer.eot] = 0
        self.train = np.memmap(folder / "train.bin", "<u2", "r")
        self.val = np.memmap(folder / "val.bin", "<u2", "r")

def load(name, vocab_size, n_tokens=1_000_000, cache="data"):
    """The corpus `name`, prepared under `cache` unless it is there; fetches no more than n_tokens need."""
    if not 257 <= vocab_size <= 65536:
        raise DataError(f"a vocabulary of {vocab_size} is not possible: use 257 to 65,536")
    cache = Path(cache).absolute()
    if name in NETWORK:  # 5 bytes a token; to two digits, so that nearly the same budgets share a folder
        megabytes = int(float(f"{n_tokens * 5 / 2**20 + 1:.1e}"))
        label, content = f"{name}-{megabytes}MB", REVISION
        read_corpus = partial(NETWORK[name], cache / "downloads", megabytes, vocab_size)
    else:
        files = files_of(name)
        label = re.sub(r"[^\w.-]+", "_", os.path.basename(os.path.abspath(name)))[:40]
        content = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
        read_corpus = partial(read_all, files)
    source = hashlib.sha256(repr((2, content)).encode()).hexdigest()  # 2: text was prepared otherwise before
    folder = cache / f"{label}-{source[:8]}-{vocab_size}"
    try:
        with lock(folder, wait=True):  # of several processes one prepares it
            with suppress(Exception):  # whatever is missing or damaged, it is made anew
                return Corpus(folder)
            prepare(*read_corpus(), vocab_size, folder, label)
            return Corpus(folder)
    except (BrokenExecutor, OSError) as e:  # a killed worker; a full disk
        raise DataError(f"cannot prepare {folder}: {e}") from None

def write_aside(path, content):
    """Under another name first, down to the disk: neither a reader nor a loss of power sees half a file."""
    os.makedirs(path.parent, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as e:  # of a full disk the system names no file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)

def without_nan(value):
    """JSON has no nan: what is not finite becomes None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)

def write_json(path, value):
    write_aside(path, json.dumps(without_nan(value), indent=1).encode())

def write_csv(path, columns, rows):
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_aside(path, text.getvalue().encode())

def catch_stops(handler):
    """For all signals that stop a program, but those that its starter ignored (nohup) -> what was before."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    stops = [number for number in signal.Signals if number.name in names]
    return {n: signal.signal(n, handler) for n in stops if signal.getsignal(n) != signal.SIG_IGN}

def lock(folder, wait=False):
    """Own a folder until the returned file is closed or this process ends. wait: for another owner to end."""
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "a+")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
    except BlockingIOError:
        file.seek(0)
        raise DataError(f"{folder} is in use by process {file.read()}: wait, or stop it") from None
    except (ImportError, OSError):  # Windows; NFS, Lustre and others without flock
        say_once("folders cannot be locked here: let no two programs work in one at once", sys.stderr)
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file

def batch_at(tokens, starts, context_length):
    import torch  # not on top: the processes that prepare a corpus need none
    if len(tokens) <= context_length:
        raise DataError(f"only {len(tokens)} tokens: use --context-length {len(tokens) - 1} or less")
    both = tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64)  # (B, T + 1)
    return torch.tensor(both[:, :-1]), torch.tensor(both[:, 1:])  # x and y, one later: (B, T)

def get_batch(tokens, batch_size, context_length, seed, step):
    """x, y: (batch_size, context_length) int64: the same for every rate, and in a run that is resumed."""
    random = np.random.Generator(np.random.Philox(key=seed % 2**64 + (step << 64)))  # Salmon et al. 2011
    starts = random.integers(0, max(len(tokens) - context_length, 1), batch_size)
    return batch_at(tokens, starts, context_length)

def val_windows(tokens, context_length, max_tokens):
    """x, y: (W, context_length) int64: always the same windows, evenly spread and apart; W >= 1."""
    there = max((len(tokens) - 1) // context_length, 1)
    n = min(max(max_tokens // context_length, 1), there)
    return batch_at(tokens, np.arange(n) * there // n * context_length, context_length)

def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Prepare a corpus and show it.")
    parser.add_argument("name", nargs="?", default="stdlib", help="stdlib, tinystories, cosmopedia or a path")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, at most (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10**6, dest="n_tokens", help="to fetch (%(default)s)")
    parser.add_argument("--cache", default="data", help="folder of prepared corpora (%(default)s)")
    try:
        corpus = load(**vars(parser.parse_args()))
    except DataError as e:
        parser.error(e)
    say(f"{corpus.folder}: {corpus.meta}")
    say("Validation, | between tokens: " + "|".join(corpus.tokenizer.decode([i]) for i in corpus.val[:150]))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
