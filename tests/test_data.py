"""data.py against plain references: a quadratic BPE, ids made by the `tokenizers` library, slices of the
token file, and a local web server that behaves as badly as the real ones sometimes do.

fixtures/tokenizers.json holds two tokenizers that `tokenizers` 0.23.3 trained, some strings, and the ids
that it gave them. "gpt2": BPE(), ByteLevel(add_prefix_space=False), BpeTrainer(vocab_size=500,
min_frequency=2, special token <|endoftext|>, initial_alphabet=ByteLevel.alphabet()). "cosmo2":
Digits(individual_digits=True) before ByteLevel, 450 entries, four special tokens, no initial alphabet:
bytes that it never saw are left out. Both were trained on the strings without <|endoftext|>, three times,
and nine times on SENTENCE.
"""

import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

import data

EOT = data.EOT
FIXTURE = json.loads((Path(__file__).parent / "fixtures/tokenizers.json").read_text(encoding="utf-8"))
HARD = FIXTURE["strings"]
SENTENCE = "the story of the little girl who liked to play in the park "
HERE = Path(data.__file__).parent


def stories(n, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(SENTENCE.split(), k=60)) + f" {seed} {i}." for i in range(n)]


def count_pieces(text):
    return Counter(data.piece_pattern(text.isascii()).findall(text))


def random_text(seed, alphabet, n):
    return "".join(random.Random(seed).choices(alphabet, k=n))


def documents_of(corpus, side):
    ids = np.asarray(getattr(corpus, side))
    parts = np.split(ids, np.flatnonzero(ids == corpus.tokenizer.eot) + 1)
    assert len(parts.pop()) == 0  # each document ends with the token
    return [corpus.tokenizer.decode(part[:-1]) for part in parts]


def all_documents(corpus):
    return sorted(documents_of(corpus, "train") + documents_of(corpus, "val"))


def run_code(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env={**os.environ, **environment})


# ------------------------------------------------------------------------------------------------------------
# BPE


def merge_pair(word, pair):
    out = []
    while word:
        n = 1
        if word[:2] == pair:
            n = 2
        out.append("".join(word[:n]))
        word = word[n:]
    return tuple(out)


def quadratic_bpe(pieces, vocab_size):
    """BPE as one would explain it: count all pairs anew for every merge."""
    tokens = [EOT, *sorted(data.CHAR_TO_BYTE)]
    words = {tuple(data.BYTE_TO_CHAR[b] for b in piece.encode()): n for piece, n in pieces.items()}
    merges = []
    while len(tokens) < vocab_size:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += n
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        merges.append(best)
        tokens.append("".join(best))
        words = {merge_pair(word, best): n for word, n in words.items()}
    return tokens, merges


def naive_encode(piece, merges):
    """The first pair of the lowest rank is merged, one at a time."""
    word = [data.BYTE_TO_CHAR[b] for b in piece.encode()]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        ranked = [(ranks[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in ranks]
        if not ranked:
            return word
        i = min(ranked)[1]
        word[i:i + 2] = [word[i] + word[i + 1]]


@pytest.mark.parametrize("alphabet", ["ab ", "aaab", "xyé🙂 ", "".join(HARD), SENTENCE])
def test_training_and_encoding_equal_the_quadratic_reference(alphabet):
    pieces = count_pieces(random_text(1, alphabet, 900))
    tokenizer = data.train_bpe(pieces, 420)
    model = tokenizer.spec["model"]
    tokens, merges = quadratic_bpe(pieces, 420)
    assert model["merges"] == [" ".join(pair) for pair in merges]
    assert model["vocab"] == {token: i for i, token in enumerate(tokens)}
    for piece in pieces:
        assert tokenizer.encode(piece) == [model["vocab"][token] for token in naive_encode(piece, merges)]


def test_decode_inverts_encode_for_any_text():
    chooser = random.Random(0)
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    tokenizer = data.train_bpe(count_pieces("\n".join(HARD)), 600)
    for text in [*HARD, "ab" * 500_000, *("".join(chooser.choices(points, k=200)) for _ in range(100))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"a{EOT}b").count(tokenizer.eot) == 1


def test_the_pattern_for_ascii_equals_the_full_one():
    alphabet = "".join(map(chr, range(128))) + "   '''sdtm"
    for text in [*filter(str.isascii, HARD), *(random_text(i, alphabet, 300) for i in range(200))]:
        for digits in (False, True):
            pieces = data.piece_pattern(False, digits).findall(text)
            assert data.piece_pattern(True, digits).findall(text) == pieces and "".join(pieces) == text
    assert not [i for i in range(0x20000, 0x110000) if unicodedata.category(chr(i)) in ("No", "Nl")]


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json, both ways


@pytest.mark.parametrize("form", ["gpt2", "cosmo2"])
def test_a_tokenizer_of_the_library_gives_its_ids(form, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(FIXTURE[form]["tokenizer"]), encoding="utf-8")
    tokenizer = data.Tokenizer.load(path)
    assert [tokenizer.encode(text) for text in HARD] == FIXTURE[form]["ids"]
    tokenizer.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == FIXTURE[form]["tokenizer"]


def test_training_gives_what_the_library_learnt():
    pieces = Counter()
    for text in [*HARD * 3, *[SENTENCE] * 9]:
        pieces += count_pieces(text.replace(EOT, ""))
    model = data.train_bpe(pieces, 500).spec["model"]
    expected = FIXTURE["gpt2"]["tokenizer"]["model"]
    assert model["vocab"] == expected["vocab"]
    assert [pair.split(" ") for pair in model["merges"]] == expected["merges"]


@pytest.mark.parametrize("place, key, value", [
    ("", "normalizer", {"type": "NFC"}), ("", "pre_tokenizer", {"type": "Split"}), ("", "model", None),
    ("model", "type", "Unigram"), ("model", "ignore_merges", True), ("model", "merges", ["a zzz"]),
    ("model", "vocab", []), ("vocab", "big", 70000), ("vocab", "a", 10**30), ("vocab", "a", -1),
    ("pre_tokenizer", "add_prefix_space", True), ("added", "lstrip", True), ("added", "id", "0")])
def test_a_tokenizer_that_would_give_other_ids_is_refused(place, key, value, tmp_path):
    spec = json.loads(json.dumps(data.train_bpe(Counter(), 257).spec))
    places = {"": spec, "vocab": spec["model"]["vocab"], "added": spec["added_tokens"][0], **spec}
    places[place][key] = value
    path = tmp_path / "tokenizer.json"
    for text in json.dumps(spec), "[]", "{", "[" * 10**5:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(data.DataError, match="tokenizer.json") as e:
            data.Tokenizer.load(path)
        assert "\n" not in str(e.value)


def test_every_16_bit_id_can_be_written(tmp_path):
    """Also those that UTF-16 keeps for pairs."""
    spec = data.train_bpe(Counter(), 257).spec
    spec["model"]["vocab"] = {token: 65535 - 40 * i for token, i in spec["model"]["vocab"].items()}
    spec["added_tokens"][0]["id"] = 65535
    tokenizer = data.Tokenizer(spec)
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "".join(map(chr, range(1, 2000)))
    ids = np.frombuffer(data.encode([text], tmp_path / "tokenizer.json"), "<u2").tolist()
    assert ids == [*tokenizer.encode(text), 65535] and {0xD8, 0xDB, 0xDC, 0xDF} <= {i >> 8 for i in ids}


# ------------------------------------------------------------------------------------------------------------
# Batches and windows


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = data.get_batch(tokens, 64, 32, seed=1, step=7)
    assert x.shape == y.shape == (64, 32) and str(x.dtype) == "torch.int64" and y.is_contiguous()
    assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    assert x[:4, 0].tolist() == [829, 4577, 3591, 157]  # the windows of all results that were published
    assert all((a == b).all() for a, b in zip((x, y), data.get_batch(tokens, 64, 32, 1, 7)))
    for seed, step in (1, 8), (2, 7), (7, 1), (-1, 7):
        assert (x != data.get_batch(tokens, 64, 32, seed, step)[0]).any()
    starts = np.concatenate([data.get_batch(tokens, 500, 32, 0, step)[0][:, 0].numpy() for step in range(60)])
    assert starts.min() == 0 and starts.max() == 5000 - 33  # every window, the last one included
    with pytest.raises(data.DataError, match="--context-length 31 or less"):
        data.get_batch(tokens[:32], 1, 32, 0, 0)


def test_validation_windows_are_fixed_and_never_overlap():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = data.val_windows(tokens, 64, 100_000)
    assert x.shape == (15, 64) and (y == x + 1).all() and len(set(x.flatten().tolist())) == x.numel()
    few, _ = data.val_windows(tokens, 64, 320)
    assert few.shape == (5, 64) and set(few[:, 0].tolist()) <= set(x[:, 0].tolist()) and few[-1, 0] > 700
    assert data.val_windows(tokens, 64, 1)[0].shape == (1, 64)
    assert data.val_windows(tokens, 999, 5)[0].shape == (1, 999)
    with pytest.raises(data.DataError, match="--context-length 999 or less"):
        data.val_windows(tokens, 1000, 1000)


# ------------------------------------------------------------------------------------------------------------
# Corpora


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def make_folder(root, documents):
    for i, document in enumerate(documents):
        path = root / f"d{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document if isinstance(document, bytes) else document.encode())
    return str(root)


def check_meta(corpus):
    assert corpus.meta["vocab_size"] == corpus.tokenizer.vocab_size == len(corpus.token_bytes)
    for side in ("train", "val"):
        ids = getattr(corpus, side)
        documents = documents_of(corpus, side)
        assert corpus.meta[f"{side}_tokens"] == len(ids) and ids.dtype == np.uint16
        assert corpus.meta[f"{side}_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert corpus.meta[f"{side}_documents"] == len(documents)
        n_bytes = sum(len(document.encode()) for document in documents)
        assert corpus.meta[f"{side}_bytes"] == corpus.token_bytes[ids].sum() == n_bytes


def test_validation_is_whole_documents_that_training_never_sees(tmp_path, cache):
    documents = stories(300) + stories(100) + [""] + HARD[3:10]  # copies stay together
    corpus = data.load(make_folder(tmp_path / "text", documents), 400, cache=cache)
    train = documents_of(corpus, "train")
    val = documents_of(corpus, "val")
    assert not set(train) & set(val) and Counter(train + val) == Counter(filter(None, documents))
    check_meta(corpus)
    share = corpus.meta["val_bytes"] / (corpus.meta["val_bytes"] + corpus.meta["train_bytes"])
    assert 0.05 < share < 0.15 and corpus.meta["documents"] == len(documents) - 1
    pieces = sum(map(count_pieces, train), Counter())  # the vocabulary is learnt from the training side alone
    assert corpus.tokenizer.spec == data.train_bpe(pieces, 400).spec


@pytest.mark.parametrize("separator", ["\n\n", " ", f"\n{EOT}\n"])
def test_a_single_text_file_is_split_into_documents(separator, tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_bytes(separator.join(stories(100)).encode())
    corpus = data.load(str(path), 300, cache=cache)
    check_meta(corpus)
    documents = all_documents(corpus)
    assert len(documents) > 10 and not set(documents_of(corpus, "train")) & set(documents_of(corpus, "val"))
    if EOT in separator:
        assert documents == sorted(stories(100))
    else:
        text = path.read_text()
        assert sum(map(len, documents)) == len(text) and all(document in text for document in documents)


@pytest.mark.parametrize("alone", [True, False])
def test_big_files_are_read_in_parts(alone, tmp_path, monkeypatch):
    """Parts of 2,000 bytes in place of 1 MiB: the documents come out the same, whole characters too."""
    monkeypatch.setattr(data, "CHUNK", 2000)
    path = tmp_path / "a.txt"
    long = [" ".join(stories(20, seed=i)) for i in range(9)]
    for documents in stories(200), long:
        path.write_text(EOT.join(documents), encoding="utf-8")
        assert "".join(data.documents(path, alone)).replace(" ", "") == "".join(documents).replace(" ", "")
    assert len(list(data.documents(path, alone))) > 9
    path.write_text("é数🙂" * 3000, encoding="utf-8")
    assert "".join(data.documents(path, alone)) == "é数🙂" * 3000


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path, cache):
    root = tmp_path / "text"
    name = make_folder(root, [*stories(60), b"\xff\xfe latin \xe9", b"bin\0ary", b""])
    (root / ".hidden").write_text("secret")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (root / "nowhere").symlink_to(root / "missing")
    os.mkfifo(root / "pipe")  # reading it would never end
    with open(root / "huge", "wb") as file:  # sparse: half a GB that nobody should read through
        file.truncate(1 << 29)
    corpus = data.load(name, 300, cache=cache)
    assert corpus.meta["skipped_files"] == 3 and all_documents(corpus) == sorted(stories(60))


def test_the_standard_library_is_there_without_its_tests():
    names = [Path(path).as_posix() for path in data.files_of("stdlib", None)]
    assert len(names) > 300 and any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "/test/" in name or "/tests/" in name or "site-packages" in name]


def test_prepared_files_are_used_again_until_the_text_changes(tmp_path, cache, monkeypatch):
    root = tmp_path / "text"
    name = make_folder(root, stories(30))
    made = []
    real = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *arguments: made.append(1) or real(*arguments))
    first = data.load(name, 300, cache=root / "cache")  # a cache inside it is no part of it
    assert data.load(name, 300, cache=root / "cache").meta == first.meta and len(made) == 1
    (root / "new.txt").write_text("new")
    assert data.load(name, 300, cache=root / "cache").meta["documents"] == 31
    (root / "new.txt").write_text("now")
    assert "now" in all_documents(data.load(name, 300, cache=root / "cache")) and len(made) == 3


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_a_damaged_corpus_is_made_anew(file, tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(30))
    corpus = data.load(name, 280, cache=cache)
    path = corpus.folder / file
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
    for damaged in b"", b"{}", b"[]", b"\0" * 999, good[:middle], flipped:
        path.write_bytes(damaged)
        assert data.load(name, 280, cache=cache).meta == corpus.meta and path.read_bytes() == good
    path.unlink()
    assert data.load(name, 280, cache=cache).meta == corpus.meta
    assert sorted(p.name for p in cache.iterdir()) == [".lock", corpus.folder.name]


def test_processes_that_start_together_prepare_once(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(60))
    code = f"""import data, time
real = data.prepare
data.prepare = lambda *arguments: (print("made"), time.sleep(1), real(*arguments))[-1]
print(data.load({name!r}, 280, cache={str(cache)!r}).meta["train_sha256"])"""
    started = [run_code(code) for _ in range(3)]
    printed = Counter(line for process in started for line in process.communicate()[0].split())
    assert sorted(printed.values()) == [1, 3] and printed["made"] == 1


def test_a_killed_preparation_leaves_neither_processes_nor_locks(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(60))
    code = f"""import data, os
data.train_bpe = lambda *_: os.kill(os.getpid(), 9)
data.load({name!r}, 280, cache={str(cache)!r})"""
    killed = run_code(code)
    killed.communicate(timeout=20)  # its workers hold the other end of the pipe: it ends when they are gone
    assert killed.returncode == -9 and list(cache.glob(".*.tmp"))
    assert data.load(name, 280, cache=cache).meta["documents"] == 60 and not list(cache.glob(".*.tmp"))


def test_bad_input_is_one_line(tmp_path, cache):
    def refused(match, name, vocab_size=300, cache=cache):
        with pytest.raises(data.DataError, match=match) as e:
            data.load(str(name), vocab_size, cache=cache)
        assert "\n" not in str(e.value)

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(stories(50)))
    refused("unknown corpus 'nosuch'.*stdlib, tinystories, cosmopedia or a path", "nosuch")
    refused("unknown corpus", "no\0\nsuch")
    refused("unknown corpus '.*/nosuch'", tmp_path / "nosuch")
    refused("unknown corpus", "x" * 3000)
    refused("256 is not possible", text, 256)
    refused("65,537 is not possible", text, 65537)
    (tmp_path / "empty.txt").write_text("")
    refused("two different documents", tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(bytes(range(1, 256)) * 9)
    refused("binary is not UTF-8 text", tmp_path / "binary")
    (tmp_path / "nul.txt").write_bytes(b"text\0text " * 999)
    refused("nul.txt is not UTF-8 text", tmp_path / "nul.txt")
    os.mkfifo(tmp_path / "pipe")
    refused("pipe", tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    refused("two different documents", tmp_path / "folder")
    (tmp_path / "folder" / "one.txt").write_text("one")
    (tmp_path / "folder" / "two.txt").write_text("one")
    refused("two different documents", tmp_path / "folder")
    refused("text.txt.*must be a folder that you can write to", text, cache=text)
    refused("must be a folder that you can write to", text, cache=text / "below")


def test_command_line(tmp_path, cache):
    name = make_folder(tmp_path / "text \udce9", [*stories(80), *HARD[10:19]])
    command = [sys.executable, data.__file__, "--cache", str(cache)]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*command, "--vocab-size", "300", name], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    for part in "88 documents", "bytes a token", "bits a byte", "|":
        assert part in done.stdout
    for flags in ["nosuch"], ["--tokens", "nan"], ["--vocab-size", "0"], ["--vocab-size", "x"], ["--nosuch"]:
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("data.py: ") and done.stderr.count("\n") == 1
    with subprocess.Popen([*command, "--vocab-size", "300", name], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()  # | head, which has gone
        assert process.stderr.read().count(b"\n") == 1 and process.wait(60) == 2


# ------------------------------------------------------------------------------------------------------------
# Downloads, from a web server of our own


class Hub(http.server.ThreadingHTTPServer):
    """A hub that redirects to a storage on another host name, as the real one does. `faults` is used up, one a
    request to the storage: a status, ("cut", bytes), ("stall", bytes), ("send", body), ("after", Retry-After),
    ("loop", address), "no range" or None."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.rows = []
        self.faults = []
        self.requests = []
        self.redirect = 302
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self):
        return [headers["Range"] for path, headers in self.requests if path.startswith("/storage/")]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", cut=None, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:cut])

    def do_GET(self):
        hub = self.server
        url = urlsplit(self.path)
        hub.requests.append((self.path, dict(self.headers)))
        name = url.path.rsplit("/", 1)[1]
        if "/resolve/" in url.path:
            place = f"http://localhost:{hub.server_address[1]}/storage/{name}"
            return self.reply(hub.redirect, b"moved", Location=place)
        fault = hub.faults.pop(0) if hub.faults else None
        kind, value = fault if isinstance(fault, tuple) else (fault, None)
        if isinstance(kind, int):
            return self.reply(kind)
        if kind == "after":
            return self.reply(429, Retry_After=value)
        if kind == "loop":
            return self.reply(302, Location=value)
        if kind == "send":
            return self.reply(200, value)
        if url.path == "/rows":
            offset = int(parse_qs(url.query)["offset"][0])
            page = [{"row_idx": offset, "row": {"text": text}} for text in hub.rows[offset:offset + 100]]
            return self.reply(200, json.dumps({"rows": page, "num_rows_total": None}).encode(), value)
        if name not in hub.files:
            return self.reply(404)
        body = hub.files[name]
        if kind == "no range":
            return self.reply(200, body)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first = int(first)
        last = min(int(last or len(body)), len(body) - 1)
        if first >= len(body):
            return self.reply(416)
        self.reply(206, body[first:last + 1], value, Content_Range=f"bytes {first}-{last}/{len(body)}")
        if kind == "stall":
            self.wfile.flush()
            hub.closing.wait(20)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(data, "HUB", hub.url)
    monkeypatch.setattr(data, "ROWS", hub.url)
    monkeypatch.setattr(data, "WAITS", (0,) * 5)
    for key in "HTTP_PROXY", "http_proxy", "HF_TOKEN":
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.closing.set()
    hub.shutdown()
    hub.server_close()


def fetch(hub, path, n_bytes=None):
    data.download(f"{hub.url}/datasets/x/resolve/main/f.txt", path, n_bytes)
    return path.read_bytes()


BODY = "naïve 数 ".join(stories(4000)).encode()


@pytest.mark.parametrize("redirect", [301, 302, 303, 307])
def test_download_follows_redirects_and_takes_what_it_needs(hub, tmp_path, redirect):
    hub.files["f.txt"] = BODY
    hub.redirect = redirect
    assert fetch(hub, tmp_path / "deep" / "part", 1001) == BODY[:1001]
    assert fetch(hub, tmp_path / "all") == fetch(hub, tmp_path / "more", 10**9) == BODY
    assert hub.ranges() == ["bytes=0-1000", "bytes=0-", "bytes=0-999999999"]
    assert fetch(hub, tmp_path / "all") == BODY and len(hub.ranges()) == 3  # it is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "deep", "more"]


@pytest.mark.parametrize("faults", [
    [("cut", 1000)], [("cut", 0), ("cut", 10), ("cut", 262_144)], ["no range"], [("cut", 5000), "no range"],
    [429, 500, 503], [("cut", 1000), 502, ("cut", 77), 429], [("cut", 1000)] * 20, [416], [("after", "0")],
    [("after", "²")], [("after", "-1")], [("after", "soon")]], ids=str)
def test_download_survives_faults(hub, tmp_path, faults):
    hub.files["f.txt"] = BODY
    hub.faults = list(faults)
    assert fetch(hub, tmp_path / "f.txt") == BODY
    if faults == [("cut", 1000)]:
        assert hub.ranges() == ["bytes=0-", "bytes=1000-"]  # it went on, and did not start again


def test_retry_after_is_obeyed(hub, tmp_path, monkeypatch):
    hub.files["f.txt"] = BODY
    hub.faults = [("after", "7"), ("after", "9999999999")]
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert fetch(hub, tmp_path / "f.txt") == BODY and slept == [7, 0]


def test_download_gives_up_in_one_line_and_resumes_later(hub, tmp_path):
    hub.files["f.txt"] = BODY
    hub.faults = [("cut", 12345), *[500] * 5]
    with pytest.raises(data.DataError, match="f.txt from .*500.*at .*f.txt by hand.*--data stdlib") as e:
        fetch(hub, tmp_path / "f.txt")
    assert "\n" not in str(e.value) and not (tmp_path / "f.txt").exists()
    hub.requests = []
    assert fetch(hub, tmp_path / "f.txt") == BODY and hub.ranges() == ["bytes=12345-"]


def test_a_killed_download_goes_on_where_it_was(hub, tmp_path):
    hub.files["f.txt"] = BODY
    hub.faults = [("stall", 700_000)]
    path = tmp_path / "f.txt"
    process = run_code(f"import data; data.download('{hub.url}/resolve/f.txt', data.Path({str(path)!r}))")
    part = tmp_path / "f.txt.part"
    while not part.exists() or part.stat().st_size < 500_000:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    have = part.stat().st_size
    assert not path.exists() and fetch(hub, path) == BODY and hub.ranges()[-1] == f"bytes={have}-"


@pytest.mark.parametrize("fault, match", [
    (401, "401"), (403, "403"), (404, "404"), (("send", b"<!DOCTYPE html><p>Log in"), "web page"),
    (("send", b"\n<HTML>"), "web page"), (("send", random.Random(0).randbytes(5000)), "binary"),
    (("send", b"text\0text"), "binary")], ids=range(7))
def test_a_refusal_or_a_page_is_not_asked_again_and_not_kept(fault, match, hub, tmp_path):
    hub.files["f.txt"] = BODY
    hub.faults = [fault]
    with pytest.raises(data.DataError, match=match):
        fetch(hub, tmp_path / "f.txt")
    assert len(hub.ranges()) == 1
    assert fetch(hub, tmp_path / "f.txt") == BODY


def test_a_redirect_loop_and_odd_addresses_are_one_line(hub, tmp_path):
    hub.faults = [("loop", f"{hub.url}/loop")] * 99
    odd = ["garbage", "http://[::1", "http://a b/", "http://127.0.0.1:x/", "http://127.0.0.1:9/", "file:///n"]
    for url in [*odd, f"{hub.url}/loop"]:
        with pytest.raises(data.DataError, match="cannot fetch f.txt") as e:
            data.download(url, tmp_path / "f.txt")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"mine", BODY[:50]])
def test_a_file_put_there_by_hand_is_taken(content, hub, tmp_path):
    (tmp_path / "f.txt").write_bytes(content)
    assert fetch(hub, tmp_path / "f.txt") == content and not hub.requests
    (tmp_path / "f.txt").write_bytes(b"")
    hub.files["f.txt"] = BODY
    assert fetch(hub, tmp_path / "f.txt") == BODY  # an empty one is none


def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch, capsys):
    hub.files["f.txt"] = BODY
    monkeypatch.setenv("HF_TOKEN", "hf_\nsecret")
    fetch(hub, tmp_path / "f.txt")
    (first, to_hub), (second, to_storage) = hub.requests
    assert "/resolve/" in first and to_hub["Authorization"] == "Bearer hf_secret"
    assert "/storage/" in second and "secret" not in f"{to_storage} {capsys.readouterr()}"


def test_endpoints_come_from_the_environment():
    code = "import data; print(data.HUB, data.ROWS)"
    printed, _ = run_code(code, HF_ENDPOINT="https://mirror.net/").communicate()
    assert printed.split() == ["https://mirror.net", "https://datasets-server.mirror.net"]


def test_without_a_network_it_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(data, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(data, "ROWS", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    monkeypatch.setenv("no_proxy", "*")
    for name in "tinystories", "cosmopedia":
        with pytest.raises(data.DataError, match="put it at .*downloads.* by hand.*--data stdlib"):
            data.load(name, 49_152, cache=cache)


def test_tinystories_end_to_end(hub, cache):
    train = stories(6000)
    valid = stories(40, seed=1)
    train[3] = valid[5]  # a validation story that stands in the training file too
    text = f"\n{EOT}\n".join(train).encode()
    hub.files["TinyStoriesV2-GPT4-train.txt"] = text
    hub.files["TinyStoriesV2-GPT4-valid.txt"] = f"\n{EOT}\n".join(valid).encode()
    small = data.load("tinystories", 300, n_tokens=100_000, cache=cache)
    assert small.meta["corpus"] == "tinystories-1MB" and f"bytes=0-{(1 << 20) - 1}" in hub.ranges()
    got = documents_of(small, "train")
    expected = [story for story in train if story not in valid][:len(got)]
    assert got[:-1] == expected[:-1] and expected[-1].startswith(got[-1])  # the last one is cut
    assert len(got) > 1000 and sorted(documents_of(small, "val")) == sorted(valid)
    check_meta(small)
    asked = len(hub.requests)
    assert data.load("tinystories", 300, n_tokens=50_000, cache=cache).meta == small.meta
    assert len(hub.requests) == asked
    whole = data.load("tinystories", 300, cache=cache)
    assert documents_of(whole, "train") == [story for story in train if story not in valid]


def test_cosmopedia_end_to_end(hub, cache):
    texts = [" ".join(stories(25, seed=i)) for i in range(250)]
    hub.rows = [None, *texts, "lone \ud800 surrogate"]
    published = data.train_bpe(count_pieces(" ".join(texts[:50])), 400)
    hub.files["tokenizer.json"] = json.dumps(published.spec).encode()
    hub.faults = [None, 429, ("cut", 1000), ("after", "0")]
    corpus = data.load("cosmopedia", 49_152, n_tokens=100_000, cache=cache)
    assert corpus.tokenizer.spec == published.spec and set(all_documents(corpus)) <= set(texts)
    check_meta(corpus)
    more = data.load("cosmopedia", 300, n_tokens=1_000_000, cache=cache)  # more than there is
    assert all_documents(more) == sorted([*texts, "lone ? surrogate"]) and more.tokenizer.vocab_size == 300
    hub.faults = [("send", b"{}")]
    (cache / "downloads" / "cosmopedia-v2-rows-0.json").unlink()
    with pytest.raises(data.DataError, match="sent no rows"):
        data.load("cosmopedia", 300, n_tokens=2_000_000, cache=cache)
    data.load("cosmopedia", 300, n_tokens=2_000_000, cache=cache)  # the bad page was not kept
