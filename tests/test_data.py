"""data.py against plain references: a quadratic BPE, ids made by the `tokenizers` library, and a local web
server that behaves as badly as real ones sometimes do.

fixtures/tokenizers.json holds two tokenizers that `tokenizers` 0.23.3 trained, some strings, and the ids
that it gave them. "gpt2": BPE(), ByteLevel(add_prefix_space=False), BpeTrainer(vocab_size=500,
min_frequency=2, special token <|endoftext|>, initial_alphabet=ByteLevel.alphabet()). "cosmo2":
Digits(individual_digits=True) before ByteLevel, 450 entries, four special tokens, no initial alphabet:
bytes that it never saw are left out. Both were trained on the strings without <|endoftext|>, three times,
and nine times on SENTENCE.
"""

import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import data
from data import EOT

FIXTURE = json.loads((Path(__file__).parent / "fixtures/tokenizers.json").read_text(encoding="utf-8"))
HARD = FIXTURE["strings"]
SENTENCE = "the story of the little girl who liked to play in the park "

def stories(n, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(SENTENCE.split(), k=60)) + f" {seed} {i}." for i in range(n)]

def random_text(seed, alphabet, n):
    return "".join(random.Random(seed).choices(alphabet, k=n))

def documents_of(corpus, *sides):
    ids = np.concatenate([getattr(corpus, side) for side in sides])
    parts = np.split(ids, np.flatnonzero(ids == corpus.tokenizer.eot) + 1)
    assert len(parts.pop()) == 0  # each document ends with the token
    return [corpus.tokenizer.decode(part[:-1]) for part in parts]

def run_code(code):
    return subprocess.Popen([sys.executable, "-c", f"import data, functools, os, time\n{code}"], text=True,
                            cwd=Path(data.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

# --------------------------------------------------------------------------------------------------
# BPE

def merge_pair(word, pair):
    """Join each pair, from the left, in a word: a str with a space after each token."""
    return re.sub("(?<!\\S)" + re.escape(" ".join(pair)) + "(?!\\S)", "".join(pair), word)

def quadratic_bpe(piece_counts, vocab_size):
    """BPE as one would explain it: count all pairs anew for every merge."""
    tokens = [EOT, *sorted(data.CHAR_TO_BYTE)]
    words = {" ".join(data.BYTE_TO_CHAR[b] for b in piece.encode()): n for piece, n in piece_counts.items()}
    merges = []
    while len(tokens) < vocab_size:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word.split(), word.split()[1:]):
                counts[pair] += n
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        merges.append(best)
        tokens.append("".join(best))
        words = {merge_pair(word, best): n for word, n in words.items()}
    return tokens, merges

@pytest.mark.parametrize("alphabet", ["ab ", "aaab", "xyé🙂 ", "".join(HARD), SENTENCE])
def test_training_and_encoding_equal_the_quadratic_reference(alphabet):
    counts = data.count([random_text(1, alphabet, 700)])
    tokenizer = data.train_bpe(counts, 380)
    model = tokenizer.spec["model"]
    tokens, merges = quadratic_bpe(counts, 380)
    assert model["merges"] == [" ".join(pair) for pair in merges]
    assert model["vocab"] == {token: i for i, token in enumerate(tokens)}
    for piece in counts:
        word = " ".join(data.BYTE_TO_CHAR[b] for b in piece.encode())
        for pair in merges:  # every merge in the order in which it was learnt
            word = merge_pair(word, pair)
        assert tokenizer.encode(piece) == [tokens.index(token) for token in word.split()]

def test_decode_inverts_encode_for_any_text():
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    tokenizer = data.train_bpe(data.count(HARD), 600)
    for text in [*HARD, "ab" * 20_000, " " * 9999, *(random_text(i, points, 200) for i in range(100))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"a{EOT}b").count(tokenizer.eot) == 1

def in_ascii(char):
    """A character that stands for all of its class in GPT-2's pattern."""
    if re.fullmatch("[ 'A-Za-z]", char):
        return char
    if char.isspace() and not "\x1c" <= char <= "\x1f":
        return "\n"
    return {"L": "x", "N": "1"}.get(unicodedata.category(char)[0], "!")

@pytest.mark.parametrize("alphabet", ["\t\n  ''stmdlrve_.,0123ab", "a1½Ⅷ٣² \n\x1c\x85é数_!'s"])
def test_pieces_are_those_of_gpt2s_pattern(alphabet):
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    for text in [*HARD, *(random_text(i, alphabet, 300) for i in range(100))]:
        same = "".join(map(in_ascii, text))
        pieces = data.pieces(text)
        assert list(map(len, pieces)) == list(map(len, re.findall(pattern, same))) and "".join(pieces) == text

# --------------------------------------------------------------------------------------------------
# tokenizer.json, both ways

@pytest.mark.parametrize("form", ["gpt2", "cosmo2"])
def test_a_tokenizer_of_the_library_gives_its_ids(form):
    tokenizer = data.Tokenizer(FIXTURE[form]["tokenizer"])
    assert [tokenizer.encode(text) for text in HARD] == FIXTURE[form]["ids"]

def test_training_gives_what_the_library_learnt():
    counts = data.count([text.replace(EOT, "") for text in [*HARD * 3, *[SENTENCE] * 9]])
    model = data.train_bpe(counts, 500).spec["model"]
    expected = FIXTURE["gpt2"]["tokenizer"]["model"]
    assert model["vocab"] == expected["vocab"]
    assert [pair.split(" ") for pair in model["merges"]] == expected["merges"]

@pytest.mark.parametrize("old, new, part", [
    ('"merges": []', '"merges": ["a zzz"]', "zzz"),
    ('"merges": []', '"merges": ["ab c", "a b"]', "merges are out of order"),
    ('"merges": []', '"merges": ["a b", "ab c", "a b"]', "merges are out of order"),
    ('"version"', '"normalizer": {"type": "NFC"}, ""', "normalizer"),
    ("{", "[" * 10**5, ""),
    ('"a": 65', '"a": "65"', ""),
    ('prefix_space": false', 'prefix_space": true', "pre_tokenizer"),
    ('"decoder"', '"pre_tokenizer": null, "decoder"', "pre_tokenizer"),
    ('"lstrip": false', '"lstrip": true', "lstrip"),
    ('"id": 0, "content": "<|endoftext|>"', '"id": 0, "content": ""', "endoftext"),
    ('"added_tokens"', '"added_tokens": [], "decoder"', "endoftext"),
    ('"version"', '"truncation": {"max_length": 8}, "version"', "truncation"),
    ('"BPE"', '"Unigram"', "type"),
    ('"BPE"', '"BPE", "dropout": 1', "dropout"),
    ('"pre_tokenizer"', '"decoder"', "pre_tokenizer")])
def test_a_tokenizer_that_would_give_other_ids_is_refused_with_the_part_named(old, new, part, tmp_path):
    text = json.dumps(data.train_bpe({}, 257).spec).replace('"a": 65', '"ab": 257, "abc": 258, "a": 65')
    path = tmp_path / "tokenizer.json"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(data.DataError, match=f"tokenizer.json.*{part}"):
        data.Tokenizer.load(path)
    path.write_text(text.replace('"a": 65', '"a": 65535'))
    assert np.frombuffer(data.encode(["a"], path), "<u2").tolist() == [65535, 0]  # all 16 bits can be used

def test_older_files_without_types_give_the_same_ids():
    spec = json.loads(json.dumps(FIXTURE["gpt2"]["tokenizer"]))
    del spec["model"]["type"], spec["pre_tokenizer"]["use_regex"]
    assert [data.Tokenizer(spec).encode(text) for text in HARD] == FIXTURE["gpt2"]["ids"]

# --------------------------------------------------------------------------------------------------
# Batches and windows

def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = data.get_batch(tokens, 30_000, 32, seed=1, step=7)
    assert x.shape == (30_000, 32) and str(x.dtype) == "torch.int64"
    assert (y == x + 1).all()
    assert (x[:, 1:] == y[:, :-1]).all()
    assert x[:4, 0].tolist() == [829, 4577, 3591, 157]  # the windows of all results that were published
    assert x.min() == 0 and y.max() == 4999  # every window, the last one included
    for seed, step in (1, 8), (2, 7), (7, 1), (-1, 7):
        assert x[:4, 0].tolist() != data.get_batch(tokens, 4, 32, seed, step)[0][:, 0].tolist()
    with pytest.raises(data.DataError, match="--context-length 31 or less"):
        data.get_batch(tokens[:32], 1, 32, 0, 0)

def test_validation_windows_are_fixed_and_never_overlap():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = data.val_windows(tokens, 64, 100_000)
    assert x.shape == (15, 64)
    assert (y == x + 1).all() and len(x.unique()) == x.numel()
    assert data.val_windows(tokens, 64, 320)[0][:, 0].tolist() == [0, 192, 384, 576, 768]
    with pytest.raises(data.DataError, match="--context-length 999 or less"):
        data.val_windows(tokens, 1000, 1000)

# --------------------------------------------------------------------------------------------------
# Corpora

class NoPool:
    """The work is done here: small texts cost less than the processes. The tests of programs have a real pool."""
    def __init__(self, *_, **__):
        self.map = map
    def shutdown(self, **_):
        pass

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(data, "load_tokenizer", data.Tokenizer.load)
    return tmp_path / "cache"

def make_folder(root, documents):
    for i, document in enumerate(documents):
        path = root / f"d{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document if isinstance(document, bytes) else document.encode())
    return str(root)

def check_meta(corpus):
    for side in ("train", "val"):
        ids = getattr(corpus, side)
        assert corpus.meta[f"{side}_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        n_bytes = sum(len(document.encode()) for document in documents_of(corpus, side))
        assert corpus.meta[f"{side}_bytes"] == corpus.token_bytes[ids].sum() == n_bytes

def test_validation_is_whole_documents_that_training_never_sees(tmp_path, cache):
    documents = stories(300) + stories(100) + HARD[3:10]  # copies stay together
    corpus = data.load(make_folder(tmp_path / "text", [*documents, ""]), 400, cache=cache)
    check_meta(corpus)
    train = documents_of(corpus, "train")
    val = documents_of(corpus, "val")
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(data.documents_in(EOT.join(documents)))
    assert 0.03 < corpus.meta["val_bytes"] / corpus.meta["train_bytes"] < 0.1
    assert corpus.tokenizer.spec == data.train_bpe(data.count(train), 400).spec  # learnt from train alone

def test_validation_is_the_lowest_hashes_that_fit_into_a_twentieth():
    documents = stories(400)
    chosen = data.choose_validation(documents)
    size = sum(len(document) for document in documents) / 20
    assert size - 500 < sum(map(len, chosen)) <= size
    ranked = sorted(documents, key=lambda text: hashlib.blake2b(text.encode()).digest())
    assert set(ranked[:len(chosen) - 3]) <= chosen
    assert data.choose_validation(documents[::-1]) == chosen  # of the set, whatever its order
    assert data.choose_validation(["two", "seven"]) == {"two"}

def test_copies_in_another_form_are_never_on_both_sides(tmp_path, cache):
    root = tmp_path / "text"
    documents = [f"{story}\n\nThe end {i}." for i, story in enumerate(stories(120))]
    make_folder(root / "one file a story", [document + "\n" for document in documents])
    make_folder(root / "from Windows", [document.replace("\n", "\r\n") for document in documents])
    make_folder(root / "with a mark", ["\ufeff" + document for document in documents])
    (root / "joined.txt").write_text(f"\n{EOT}\n".join(documents) + "\n")
    corpus = data.load(str(root), 300, cache=cache)
    train = documents_of(corpus, "train")
    val = documents_of(corpus, "val")
    assert val and not set(train) & set(val)
    assert Counter(train + val) == Counter(documents * 4)

@pytest.mark.parametrize("separator", ["\n\n", " ", f"\n{EOT}\n"])
def test_a_single_text_file_is_split_into_documents(separator, tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_text(separator.join(stories(100)))
    corpus = data.load(str(path), 300, cache=cache)
    train = documents_of(corpus, "train")
    val = documents_of(corpus, "val")
    assert len(train) > 10 and not set(train) & set(val)
    if EOT in separator:
        assert sorted(train + val) == sorted(stories(100))
    else:
        assert sorted("".join(train + val).replace(" ", "")) == sorted("".join(path.read_text().split()))

def test_half_a_character_at_the_end_of_a_text_is_cut(tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_bytes(EOT.join([*stories(50), "naï"]).encode()[:-1])
    assert sorted(documents_of(data.load(str(path), 300, cache=cache), "train", "val")) == sorted([*stories(50), "na"])

def test_lines_of_json_are_read_as_their_texts(tmp_path, cache):
    rows = [json.dumps({"text": f"{story}\u2028 {{é}}", "id": 1}) for story in stories(50)]
    rows += ['{"id": 2}', '{"text": null}', '{"text": "half a sto']
    path = tmp_path / "stories.jsonl"
    path.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    corpus = data.load(str(path), 300, cache=cache)
    found = documents_of(corpus, "train", "val")
    assert sorted(found) == sorted(f"{story}\u2028 {{é}}" for story in stories(50))

@pytest.mark.parametrize("content", [
    gzip.compress(b"text " * 99), "text, naïve".encode("utf-16"), "Übermut tut gut".encode("latin-1")])
def test_what_is_no_utf8_is_named_with_what_to_do(content, tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="text.txt.*gunzip.*UTF-16.*LATIN1"):
        data.load(str(path), 300, cache=cache)

def test_text_without_spaces_is_learnt_and_encoded_as_by_the_reference():
    for alphabet in "ACGT", [chr(0x4E00 + i) for i in range(40)]:
        text = random_text(3, alphabet, 1100)
        counts = data.count([text])
        assert max(map(len, counts)) == 1000
        tokenizer = data.train_bpe(counts, 280)
        assert tokenizer.spec["model"]["merges"] == [" ".join(pair) for pair in quadratic_bpe(counts, 280)[1]]
        assert tokenizer.decode(tokenizer.encode(text)) == text

def test_files_that_are_no_text_are_skipped_and_counted(tmp_path, cache, capfd):
    root = tmp_path / "text"
    name = make_folder(root, [*stories(60), b"\xff\xfe latin \xe9", b"bin\0ary", b""])
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    os.mkfifo(root / "pipe")  # reading it would never end
    with open(root / "huge", "wb") as file:  # sparse: a TB that nobody should read through
        file.truncate(1 << 40)
    (root / "linked").symlink_to(root)
    assert sorted(documents_of(data.load(name, 300, cache=cache), "train", "val")) == sorted(stories(60))
    errors = capfd.readouterr().err
    assert "no UTF-8 text: 3 files" in errors and f"not followed: '{root}/linked'" in errors

def test_what_this_program_writes_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path, stories(40))
    corpora = []
    for i in range(3):
        corpora.append(data.load(".", 300).meta)
        assert sorted(documents_of(data.load(".", 300), "train", "val")) == sorted(stories(40))
        for folder in f"runs/tiny/lr{i}", f"elsewhere/run{i}":
            data.lock(folder).close()
            Path(folder, "training.log").write_text("step 1")
            Path(folder, "metrics.csv").write_text("step,tokens")
        Path("runs/tiny/lr_sweep_analysis.md").write_text(f"Use {i}")
        Path("nohup.out").write_text("step 1\n" * i)
        Path("sweep.log").write_text("step 1\n" * i)
    assert corpora[0] == corpora[1] == corpora[2] and len(list(Path("data").iterdir())) == 1

@pytest.mark.parametrize("name", ["a b\u00a0c\u3000d", "🙂" * 60, "x" * 250, "a\udce9b\nc"])
def test_any_name_will_do(name, tmp_path, cache, capsys):
    path = tmp_path / name
    path.write_text(EOT.join(stories(40)))
    corpus = data.load(str(path), 300, cache=cache)
    assert json.loads((corpus.folder / "meta.json").read_text()) == corpus.meta
    assert re.fullmatch(r"[\w.-]{1,60}", corpus.folder.name)
    data.say(f"{corpus.folder} from {path}", sys.stderr)
    with pytest.raises(data.DataError) as e:
        data.load(str(path) + "x", 300, cache=cache)
    data.say(e.value)

def test_the_standard_library_is_there_without_its_tests():
    names = [Path(path).as_posix() for path in data.files_of("stdlib")]
    assert len(names) > 300 and any(name.endswith("/argparse.py") for name in names)
    assert not re.search("/tests?/|site-packages", "\n".join(names))

def test_a_text_that_changed_is_prepared_anew(tmp_path):
    root = tmp_path / "text"
    name = make_folder(root, stories(30))
    for text in "old", "new":
        (root / "text.txt").write_text(text)
        corpus = data.load(name, 300, cache=root / "cache")  # a cache inside it is no part of it
        assert text in documents_of(corpus, "train", "val")

@pytest.mark.parametrize("file", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_a_damaged_corpus_is_made_anew(file, tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(30))
    corpus = data.load(name, 280, cache=cache)
    path = corpus.folder / file
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
    for damaged in b"", flipped, None:
        if path.name == "meta.json" and damaged == flipped:
            continue  # its own words have no checksum
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert data.load(name, 280, cache=cache).meta == corpus.meta and path.read_bytes() == good
    assert list(cache.iterdir()) == [corpus.folder]

def test_of_several_that_start_together_one_prepares(tmp_path, cache, monkeypatch):
    name = make_folder(tmp_path / "text", stories(60))
    real = data.prepare
    made = []
    monkeypatch.setattr(data, "prepare", lambda *arguments: (made.append(1), time.sleep(0.2), real(*arguments)))
    loaded = []
    def load():  # each call opens the lock for itself, as another process would
        loaded.append(data.load(name, 280, cache=cache).meta["train_sha256"])
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(loaded) == 3 and len(set(loaded)) == 1

def test_a_killed_preparation_leaves_neither_processes_nor_locks(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(60))
    killed = run_code(f"""data.train_bpe = lambda *_: os.kill(os.getpid(), 9)
data.load({name!r}, 280, cache={str(cache)!r})""")
    killed.communicate(timeout=20)  # its workers hold the other end of the pipe: it ends when they are gone
    assert killed.returncode == -9
    assert len(documents_of(data.load(name, 280, cache=cache), "train", "val")) == 60

def test_bad_input_is_one_line(tmp_path):
    copies = make_folder(tmp_path / "copies", ["one", "one"])
    nul = make_folder(tmp_path / "nul", [b"text\0text"])
    for name, match in ("no\nsuch", r"'no\\nsuch'.*stdlib"), (copies, "copies.* two different"), (nul, "0.txt"):
        with pytest.raises(data.DataError, match=match):
            data.load(name, 300, cache=tmp_path)

def test_command_line(tmp_path):
    name = make_folder(tmp_path / "text \udce9", [*stories(80), *HARD[10:15]])
    command = [sys.executable, data.__file__, "--cache", str(tmp_path), "--vocab-size", "300"]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*command, name], capture_output=True, text=True, env=plain)
    assert done.returncode == 0 and re.search(r"'train_tokens': .*\nValidation.*\|", done.stdout)

def test_a_line_is_printed_on_any_console_or_lost_quietly(monkeypatch, tmp_path):
    for encoding, shown in ("cp1252", b"na\xefve \\u2713 \\udce9"), ("utf-8", "naïve ✓ \\udce9".encode()):
        raw = io.BytesIO()
        console = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
        data.say("naïve ✓ \udce9", console)
        assert raw.getvalue() == shown + b"\n"
    text = io.StringIO()  # has no encoding, as some notebooks
    data.say("naïve ✓", text)
    assert text.getvalue() == "naïve ✓\n"
    text.close()
    data.say("closed", text)
    monkeypatch.setattr(sys, "stdout", None)
    data.say("none")
    with open("/dev/full", "w") as full:
        for _ in range(3):
            data.say("full", full)  # and closing it raises nothing

def test_a_lost_console_does_not_change_the_exit_status():
    with run_code("time.sleep(0.1)\nfor i in range(9): data.say(i)\nprint(1)") as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0

def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_size, path.exists())))
    data.write_aside(path, b"12345")
    assert synced == [(5, False)] and path.read_bytes() == b"12345"
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fdopen(descriptor, "wb", closefd=False).write(1))
    with suppress(TypeError):
        data.write_aside(path, b"67")
    assert path.read_bytes() == b"12345" and os.listdir(path.parent) == ["file"]
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as e:
        data.write_aside(path, b"67")
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, str(path)) and os.listdir(path.parent) == ["file"]

def test_without_locks_it_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", none)
    for name in "a", "b", "b":
        with data.lock(tmp_path / name, wait=name == "a"):
            assert (tmp_path / name / ".lock").read_text() == str(os.getpid())
    assert capsys.readouterr().err.count("cannot be locked") == 1

# --------------------------------------------------------------------------------------------------
# Downloads, from a web server of our own

class Handler(http.server.BaseHTTPRequestHandler):
    """A hub that redirects to a storage on another host name, as the real one does. The server's `faults` are
    used up, one a request to the storage: a status, (status, header), ("cut", bytes), "endless" or None."""

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", cut=None, place="", header=None):
        self.send_response(status)
        self.send_header(*header or ("X", ""))
        self.send_header("Content-Length", len(body))
        self.send_header("Location", place)
        self.end_headers()
        self.wfile.write(body[:cut])

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.path, dict(self.headers)))
        name = re.sub(r"\?.*offset=", "-", self.path.rsplit("/", 1)[1])
        if "/resolve/" in self.path:
            place = f"http://localhost:{hub.server_address[1]}/storage/{name}"
            return self.reply(302, b"moved", place=place)
        fault = hub.faults.pop(0) if hub.faults else None
        kind, value = fault if isinstance(fault, tuple) else (fault, None)
        body = hub.files[name]
        first, last = map(int, re.findall("[0-9]+", self.headers["Range"]))
        if isinstance(kind, int):
            self.reply(kind, place=f"{hub.url}/resolve/{name}", header=value)
        elif kind == "endless":
            self.send_response(200)
            self.send_header("Content-Length", 1 << 60)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(body)
        else:
            self.reply(206, body[first:last + 1], value)

@pytest.fixture
def hub(monkeypatch):
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files = {"f.txt": BODY}
    hub.faults = []
    hub.requests = []
    hub.url = f"http://127.0.0.1:{hub.server_address[1]}"
    hub.ranges = lambda: [headers["Range"] for path, headers in hub.requests if path.startswith("/storage/")]
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(data, "HUB", hub.url)
    monkeypatch.setattr(data, "ROWS", hub.url)
    hub.slept = []
    monkeypatch.setattr(time, "sleep", hub.slept.append)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.shutdown()
    hub.server_close()

def fetch(hub, path, *n_bytes):
    data.download(f"{hub.url}/datasets/x/resolve/main/f.txt", path, *n_bytes)
    return path.read_bytes()

BODY = "naïve 数 ".join(stories(2500)).encode()

def test_download_takes_what_it_needs_and_once(hub, tmp_path):
    assert fetch(hub, tmp_path / "part", 1001) == BODY[:1001]
    assert hub.ranges() == ["bytes=0-1000"]
    assert fetch(hub, tmp_path / "all") == fetch(hub, tmp_path / "more", 10**9) == BODY
    assert fetch(hub, tmp_path / "all") == BODY and len(hub.ranges()) == 3  # it is there
    (tmp_path / "mine").write_bytes(b"put there by hand")
    assert fetch(hub, tmp_path / "mine") == b"put there by hand" and len(hub.ranges()) == 3

@pytest.mark.parametrize("faults, match", [
    ([("cut", 10)], "missing"),
    ([416], "416"),
    ([500], "500"),
    ([302] * 30, "302")])
def test_a_download_that_fails_says_so_in_a_line_and_the_next_one_goes_on(faults, match, hub, tmp_path):
    path = tmp_path / "f.txt"
    for before in [("cut", 5000)], [("cut", 262_144)], faults:
        hub.faults = before.copy()
        with pytest.raises(data.DataError, match="(?s)f.txt from .*by hand.*--data stdlib") as e:
            fetch(hub, path)
        assert not path.exists()
    hub.faults = []
    assert match in str(e.value) and fetch(hub, path) == BODY
    assert hub.ranges()[-1].startswith(f"bytes={267_144 + 10 * (match == 'missing')}-")

@pytest.mark.parametrize("url", ["garbage", "http://[::1", "http://a b/", "http://127.0.0.1:9/", "file:///n"])
def test_odd_addresses_are_one_line_at_once(url, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(data.DataError, match="cannot fetch f.txt"):
        data.download(url, tmp_path / "f.txt")

@pytest.mark.parametrize("header, seconds", [
    (("Retry-After", "7"), 7), (("RateLimit", '"resolvers";r=0;t=123'), 123), (("Retry-After", "900"), 900),
    (("Retry-After", "Fri, 01 Jan 2027 00:00:00 GMT"), 300), (None, 300)])
def test_a_limit_is_waited_for_where_the_server_says_how_long(header, seconds, hub, tmp_path, capsys):
    hub.faults = [("cut", 1000)]
    with pytest.raises(data.DataError, match="missing"):
        fetch(hub, tmp_path / "f.txt")
    hub.faults = [(429, header)]
    if seconds < 300:
        assert fetch(hub, tmp_path / "f.txt") == BODY
        assert hub.slept == [seconds] and f"going on in {seconds} s" in capsys.readouterr().err
    else:
        with pytest.raises(data.DataError, match=f"limited, run again in {seconds} s"):
            fetch(hub, tmp_path / "f.txt")
        assert fetch(hub, tmp_path / "f.txt") == BODY and hub.slept == []
    assert hub.ranges()[-1].startswith("bytes=1000-")  # what came is kept

def test_a_server_without_range_starts_again_and_is_not_read_to_its_end(hub, tmp_path):
    hub.faults = [("cut", 300)]
    with pytest.raises(data.DataError, match="missing"):
        fetch(hub, tmp_path / "f.txt", 1001)
    hub.faults = ["endless"]
    assert fetch(hub, tmp_path / "f.txt", 1001) == BODY[:1001]

def test_endpoints_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.net/")
    for rows, expected in ("", "https://datasets-server.huggingface.co"), ("http://r:1/", "http://r:1"):
        if rows:
            monkeypatch.setenv("HF_ROWS_ENDPOINT", rows)
        spec = importlib.util.spec_from_file_location("again", data.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        assert (again.HUB, again.ROWS) == ("https://mirror.net", expected)

def test_tinystories_end_to_end(hub, cache):
    train = stories(4000)
    valid = stories(40, seed=1)
    hub.files["TinyStoriesV2-GPT4-train.txt"] = f"\n{EOT}\n".join([valid[5], *train]).encode()
    hub.files["TinyStoriesV2-GPT4-valid.txt"] = f"\n{EOT}\n".join(valid).encode()
    small = data.load("tinystories", 300, n_tokens=100_000, cache=cache)
    check_meta(small)
    assert small.meta["corpus"] == "tinystories-1MB"
    assert "bytes=0-1048575" in hub.ranges()
    found = documents_of(small, "train")
    assert len(found) > 1000 and found == train[:len(found)]  # the story in which the budget ends is left out
    asked = len(hub.requests)
    assert data.load("tinystories", 300, n_tokens=50_000, cache=cache).meta == small.meta
    assert len(hub.requests) == asked and documents_of(small, "val") == valid

def test_cosmopedia_end_to_end(hub, cache, capsys):
    texts = [" ".join(stories(20, seed=i)) for i in range(250)]
    rows = [{"row": {"text": text}} for text in [*texts, "lone \ud800 surrogate"]]
    for offset in 0, 100, 200:
        page = {"rows": rows[offset:offset + 100], "num_rows_total": None}
        hub.files[f"rows-{offset}"] = json.dumps(page).encode()
    published = data.train_bpe(data.count(texts[:50]), 400).spec
    hub.files["tokenizer.json"] = json.dumps(published).encode()
    hub.faults = [(429, ("Retry-After", "5"))]
    corpus = data.load("cosmopedia", 49_152, n_tokens=100_000, cache=cache)
    assert "about 4 requests" in capsys.readouterr().err
    check_meta(corpus)
    assert corpus.tokenizer.spec == published
    assert set(documents_of(corpus, "train", "val")) <= set(texts)
    more = data.load("cosmopedia", 300, n_tokens=1_000_000, cache=cache)  # more than there is
    assert sorted(documents_of(more, "train", "val")) == sorted([*texts, "lone ? surrogate"])
