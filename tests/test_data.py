"""data.py against plain references: a quadratic BPE, slices of the token file, the `tokenizers` library where it is
installed, and a local web server that behaves as badly as the real ones sometimes do."""

import email.utils
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
HARD = [
    "", " ", "\n", "a", "Hello, world! It's we'll they've I'm you'd 'tis don't DON'T 's's", "x = 3.1e-10  # pi\n\n\tx",
    "line\r\nline\r\n\r\n\rline\x0b\x0c", "many   spaces   \n\n\n   \t\t  tab \t", "   lead", "trail   ", "  12  34",
    "🙂🙃👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 emoji👍🏽x", "数据是什么？今天12月３日。日本語テキスト 한국어 텍스트", "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "½ ²³ Ⅷ ①② ৩ ٣ x² 1½ a½b", "e\u0301 n\u0303 Z\u0308 \u0301x",
    "no\u00a0break\u2003em\u3000wide\u1680ogham\u205f\u202f",
    "nel\u0085nel \u001cfs\u001dgs\u001ers\u001fus \u001c\u001c", "\u2028line\u2029par\u200bzero\ufeffbom",
    "\x00\x01\x7f control", "ab\u2019s \u2018x\u2019",
    "snake_case __dunder__ _ _a a_ 1_000", f"a{EOT}b {EOT} c{EOT}{EOT}", "<|endoftext|", "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚 𐍈 𒐕", 
    "a" * 300 + "=" * 300,
    "ACGT" * 100, " " * 1000 + "x", "İıßſ ŉ ǅ ª º ʰ", "''s 's' 'll'll '",
]
STORY_WORDS = "once upon a time there was little girl named Lily who liked to play with red ball in the park".split()


def stories(n, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(STORY_WORDS, k=60)) + f" {seed} {i}." for i in range(n)]


def count_pieces(text):
    return Counter(data.piece_pattern(text.isascii()).findall(text))


def token_documents(corpus, side):
    ids, out = getattr(corpus, side), []
    for document in np.split(np.asarray(ids), np.flatnonzero(ids == corpus.tokenizer.eot) + 1):
        out.append(corpus.tokenizer.decode(document).removesuffix(EOT))
    assert out.pop() == ""  # each document ends with the token
    return out


# ----------------------------------------------------------------------------------------------------------------------
# BPE


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
        best = min(counts, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        if "".join(best) not in tokens:
            tokens.append("".join(best))
        words = {merge_pair(word, best): n for word, n in words.items()}
    return tokens, merges


def merge_pair(word, pair):
    out, i = [], 0
    while i < len(word):
        n = 2 if word[i:i + 2] == pair else 1
        out.append("".join(word[i:i + n]))
        i += n
    return tuple(out)


def naive_encode(piece, merges):
    """The first pair of the lowest rank is merged, one at a time."""
    word = [data.BYTE_TO_CHAR[b] for b in piece.encode()]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while ranked := [(ranks[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in ranks]:
        i = min(ranked)[1]
        word[i:i + 2] = [word[i] + word[i + 1]]
    return word


def random_text(seed, alphabet, n):
    return "".join(random.Random(seed).choices(alphabet, k=n))


@pytest.mark.parametrize("text", ["\n".join(HARD), random_text(1, "ab ", 3000), random_text(2, "abc  \n", 3000),
                                  random_text(3, "aaab", 2000), random_text(4, "xyé🙂 ", 2000), " ".join(stories(20))])
def test_training_equals_the_quadratic_reference(text):
    pieces = count_pieces(text)
    tokenizer = data.train_bpe(pieces, 420)
    tokens, merges = quadratic_bpe(pieces, 420)
    assert [tuple(m.split(" ")) for m in tokenizer.spec["model"]["merges"]] == merges
    assert list(tokenizer.spec["model"]["vocab"]) == tokens
    assert list(tokenizer.spec["model"]["vocab"].values()) == list(range(len(tokens)))
    vocab = tokenizer.spec["model"]["vocab"]
    for piece in pieces:
        if len(piece) <= 400:
            assert tokenizer.encode(piece) == [vocab[token] for token in naive_encode(piece, merges)]


def test_any_list_of_merges_is_applied_in_order():
    """Made-up merges, of which many spell the same token or use one that only a later merge makes."""
    for seed in range(20):
        chooser, spec = random.Random(seed), data.train_bpe(Counter(), 257).spec
        tokens, merges, vocab = ["a", "b", "c"], [], spec["model"]["vocab"]
        while len(merges) < 60:
            pair = chooser.choice(tokens), chooser.choice(tokens)
            if len("".join(pair)) < 9 and pair not in merges:
                merges.append(pair)
                tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
                vocab.setdefault("".join(pair), len(vocab))
        spec["model"]["merges"] = [list(pair) for pair in merges]  # the newer spelling; ours is "a b"
        tokenizer = data.Tokenizer(spec)
        for n in range(100):
            piece = random_text(n, "abc", n)
            assert tokenizer.encode(piece) == [vocab[token] for token in naive_encode(piece, merges)]


def test_long_pieces_are_merged_like_short_ones():
    tokenizer = data.train_bpe(Counter(random_text(i, "ab", 30) for i in range(99)), 500)
    merges = [tuple(m.split(" ")) for m in tokenizer.spec["model"]["merges"]]
    for n in range(95, 700, 15):
        piece = random_text(n, "ab", n)
        assert [tokenizer.bytes[i].decode() for i in tokenizer.encode(piece)] == naive_encode(piece, merges)
    assert tokenizer.decode(tokenizer.encode("ab" * 500_000)) == "ab" * 500_000  # one at a time, it would take an hour


def test_every_16_bit_id_can_be_written(tmp_path):
    """Also those that UTF-16 keeps for pairs."""
    spec = data.train_bpe(Counter(), 257).spec
    spec["model"]["vocab"] = {token: 65535 - 40 * i for token, i in spec["model"]["vocab"].items()}
    spec["added_tokens"][0]["id"] = 65535
    tokenizer = data.Tokenizer(spec)
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "".join(map(chr, range(1, 2000)))
    (tmp_path / "text").write_text(text, "utf-8", newline="")
    task, = data.plan([tmp_path / "text"])
    train, val, *_ = data.encode(task, frozenset(), tmp_path / "tokenizer.json")
    assert np.frombuffer(train, "<u2").tolist() == [*tokenizer.encode(text), 65535] and val == b""
    assert {0xD8, 0xDB, 0xDC, 0xDF} <= {i >> 8 for i in tokenizer.encode(text)}


def test_training_stops_when_no_pair_occurs_twice():
    assert data.train_bpe(Counter({"abcd": 1, "xyz": 1}), 1000).vocab_size == 257
    assert data.train_bpe(Counter({"abcd": 2}), 1000).vocab_size == 257 + 3
    assert data.train_bpe(Counter(), 1000).vocab_size == 257


def test_decode_inverts_encode_for_any_text():
    chooser = random.Random(0)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    tokenizer = data.train_bpe(count_pieces("\n".join(HARD) + " ".join(stories(50))), 600)
    texts = HARD + ["".join(map(chr, chooser.choices(points, k=200))) for _ in range(100)]
    texts += ["".join(chooser.choices("".join(HARD), k=100)) for _ in range(200)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"a{EOT}b").count(tokenizer.eot) == 1


def test_piece_pattern_on_ascii_equals_the_full_one():
    alphabet = "".join(map(chr, range(128))) + "   '''sdtm"
    for text in [*filter(str.isascii, HARD), *(random_text(i, alphabet, 300) for i in range(200))]:
        for digits in "", "one", "run":
            assert data.piece_pattern(True, digits).findall(text) == data.piece_pattern(False, digits).findall(text)
            assert "".join(data.piece_pattern(False, digits).findall(text)) == text


def test_numbers_that_are_no_digits_are_all_listed():
    assert not [i for i in range(0x20000, 0x110000) if unicodedata.category(chr(i)) in ("No", "Nl")]


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.json, both ways


def test_pieces_equal_those_of_tokenizers_for_every_character():
    """Every one that this Python's Unicode tables know; those of the library may be newer."""
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = {"": theirs, "one": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), theirs]),
              "run": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), theirs])}
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")]
    for start in range(0, len(known), 2000):
        text = "".join(f"a{c}1{c} {c}!{c}\n {c}{c}" for c in known[start:start + 2000] if c != "\uffff")
        for name in digits if start < 4000 else [""]:
            pieces = [text[a:b] for _, (a, b) in digits[name].pre_tokenize_str(text)]
            assert pieces == data.piece_pattern(False, name).findall(text)


def library_tokenizer(texts, vocab_size=500, digits=None, prefix=False, special=(EOT,), **trainer):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    steps = [pre.Digits(individual_digits=digits)] if digits is not None else []
    steps.append(pre.ByteLevel(add_prefix_space=prefix))
    tokenizer.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False, min_frequency=2, **trainer))
    return tokenizer


def test_ours_loads_in_tokenizers_with_equal_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = data.train_bpe(count_pieces("\n".join(HARD * 2) + " ".join(stories(50))), 700)
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size and theirs.token_to_id(EOT) == ours.eot
    for text in [*HARD, "\n".join(HARD), " ".join(stories(3))]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text
    again = data.Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode("\n".join(HARD)) == ours.encode("\n".join(HARD))


def test_training_equals_the_trainer_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    text = "\n".join(HARD * 2) + " ".join(stories(50)) + Path(data.__file__).read_text("utf-8").replace(EOT, "")
    text = text.replace(EOT, "")
    theirs = library_tokenizer([text], 1500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = json.loads(theirs.to_str())["model"]
    ours = data.train_bpe(count_pieces(text), 1500).spec["model"]
    assert ours["vocab"] == model["vocab"] and [m.split(" ") for m in ours["merges"]] == model["merges"]


@pytest.mark.parametrize("settings", [
    {}, {"digits": True}, {"digits": False}, {"prefix": True}, {"vocab_size": 5000, "digits": True},
    {"special": (EOT, "<|im_start|>", "<|im_start|>x", "<s>")}], ids=str)
def test_theirs_loads_here_with_equal_ids(settings, tmp_path):
    """Without an initial alphabet they leave out bytes they never saw, and merge across them; so must this."""
    texts = ["\n".join(HARD[:12] * 3), " ".join(stories(50)), "2024 12 1 3.14 x12y 007 " * 9]
    theirs = library_tokenizer(texts, **settings)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = data.Tokenizer.load(tmp_path / "tokenizer.json")
    texts = [*HARD, "\n".join(HARD), "a  1 22  333   x1y2", "1\n\n2 \n 3\t4", "<|im_start|>x<|im_start|><s> y<s>"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, text
    if not settings.get("prefix"):
        for text in HARD[:12]:
            assert ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "tokenizer.json").read_text())


@pytest.mark.parametrize("change", [
    lambda spec: spec.update(normalizer={"type": "NFC"}), lambda spec: spec["model"].update(type="Unigram"),
    lambda spec: spec.update(pre_tokenizer={"type": "Split"}), lambda spec: spec["model"].update(ignore_merges=True),
    lambda spec: spec["model"]["vocab"].update(big=70000), lambda spec: spec["model"].pop("vocab"),
    lambda spec: spec["added_tokens"][0].update(lstrip=True), lambda spec: spec["model"].update(merges=[["a", "zzz"]])])
def test_a_tokenizer_that_would_give_other_ids_is_refused(change, tmp_path):
    spec = json.loads(json.dumps(data.train_bpe(Counter(), 257).spec))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(data.DataError, match="tokenizer.json") as e:
        data.Tokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# Batches and windows


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = data.get_batch(tokens, 64, 32, seed=1, step=7)
    assert x.shape == y.shape == (64, 32) and x.dtype == y.dtype and str(x.dtype) == "torch.int64" and y.is_contiguous()
    assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    np.random.seed(0)  # no hidden state: neither what was drawn before nor the order of steps matters
    data.get_batch(tokens, 64, 32, seed=1, step=8)
    assert all((a == b).all() for a, b in zip((x, y), data.get_batch(tokens, 64, 32, 1, 7)))
    others = [data.get_batch(tokens, 64, 32, seed, step)[0] for seed, step in [(1, 8), (2, 7), (7, 1), (0, 7), (-1, 7)]]
    assert all((x != other).any() for other in others)
    starts = np.concatenate([data.get_batch(tokens, 500, 32, 0, step)[0][:, 0].numpy() for step in range(60)])
    assert starts.min() == 0 and starts.max() == 5000 - 33  # every window, the last one included
    with pytest.raises(data.DataError, match="context-length"):
        data.get_batch(tokens[:32], 1, 32, 0, 0)


def test_validation_windows_are_fixed_and_never_overlap():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = data.val_windows(tokens, 64, 100_000)
    assert x.shape == (15, 64) and (y == x + 1).all() and len(set(x.flatten().tolist())) == x.numel()
    few, _ = data.val_windows(tokens, 64, 320)
    assert few.shape == (5, 64) and {int(i) for i in few[:, 0]} <= {int(i) for i in x[:, 0]} and few[-1, 0] > 700
    assert data.val_windows(tokens, 64, 1)[0].shape == (1, 64) and data.val_windows(tokens, 999, 5)[0].shape == (1, 999)
    with pytest.raises(data.DataError, match="--context-length 999 or less"):
        data.val_windows(tokens, 1000, 1000)


# ----------------------------------------------------------------------------------------------------------------------
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
    for side in "train", "val":
        ids = getattr(corpus, side)
        raw = (corpus.folder / f"{side}.bin").read_bytes()
        assert corpus.meta[f"{side}_tokens"] == len(ids) == len(raw) // 2 and ids.dtype == np.uint16
        assert corpus.meta[f"{side}_sha256"] == hashlib.sha256(raw).hexdigest()
        assert corpus.meta[f"{side}_bytes"] == sum(len(d.encode()) for d in token_documents(corpus, side))
    assert corpus.meta["vocab_size"] == corpus.tokenizer.vocab_size


def test_validation_is_whole_documents_that_training_never_sees(tmp_path, cache):
    documents = stories(300) + stories(100) + [""] + HARD[3:10]  # the first hundred twice: copies must stay together
    corpus = data.load(make_folder(tmp_path / "text", documents), 400, cache=cache)
    train, val = token_documents(corpus, "train"), token_documents(corpus, "val")
    assert not set(train) & set(val)
    assert Counter(train) + Counter(val) == Counter(filter(None, documents))  # nothing lost, nothing changed
    check_meta(corpus)
    share = corpus.meta["val_bytes"] / (corpus.meta["val_bytes"] + corpus.meta["train_bytes"])
    assert 0.05 < share < 0.15 and corpus.meta["documents"] == len(documents) - 1 and corpus.meta["skipped_files"] == 0


def test_vocabulary_is_learnt_from_the_training_side_alone(tmp_path, cache):
    corpus = data.load(make_folder(tmp_path / "text", stories(200)), 500, cache=cache)
    pieces = Counter()
    for document in token_documents(corpus, "train"):
        pieces += count_pieces(document)
    assert corpus.tokenizer.spec == data.train_bpe(pieces, 500).spec


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", f"\n{EOT}\n"])
def test_a_single_text_file_is_split_into_documents(separator, tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_bytes(separator.join(stories(100)).encode())
    corpus = data.load(str(path), 300, cache=cache)
    train, val = token_documents(corpus, "train"), token_documents(corpus, "val")
    check_meta(corpus)
    assert val and len(train) > 10 and not set(train) & set(val)
    if EOT in separator:
        assert sorted(train + val) == sorted(stories(100))
    else:
        text = path.read_text()
        assert sum(map(len, train + val)) == len(text) and all(document in text for document in train + val)
        if separator == "\n\n":
            assert all(document.endswith(("\n\n", ".")) for document in train + val)


def test_big_files_are_cut_between_documents(tmp_path, cache, monkeypatch):
    """Spans of 2,000 bytes in place of 4 MiB: the documents must come out the same, in a folder and alone."""
    monkeypatch.setattr(data, "SPAN", 2000)
    monkeypatch.setattr(data, "LONGEST", 8000)
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.write_text(f"{EOT}".join(stories(200)))
    for name in str(path), str(path.parent):
        corpus = data.load(name, 300, cache=cache)
        assert sorted(token_documents(corpus, "train") + token_documents(corpus, "val")) == sorted(stories(200))
    long = [" ".join(stories(20, seed=i)) for i in range(9)]  # documents of 7,000 bytes, longer than a span
    path.write_text(EOT.join(long))
    corpus = data.load(str(path), 300, cache=cache)
    assert sorted(token_documents(corpus, "train") + token_documents(corpus, "val")) == sorted(long)
    path.write_text("é数🙂" * 3000)  # nowhere to cut: at least not within a character
    corpus = data.load(str(path), 300, cache=cache)
    assert sum(map(len, token_documents(corpus, "train") + token_documents(corpus, "val"))) == 9000
    assert corpus.meta["skipped_files"] == 0


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path, cache):
    root = tmp_path / "text"
    name = make_folder(root, [*stories(60), b"\xff\xfe latin \xe9", b"bin\0ary", b""])
    (root / ".hidden").write_text("secret")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (root / "nowhere").symlink_to(root / "missing")
    with open(root / "huge", "wb") as file:  # sparse: half a GB that nobody should read through
        file.truncate(1 << 29)
    corpus = data.load(name, 300, cache=cache)
    assert corpus.meta["skipped_files"] == 3 and corpus.meta["documents"] == 60
    assert sorted(token_documents(corpus, "train") + token_documents(corpus, "val")) == sorted(stories(60))


def test_the_standard_library_is_there_without_its_tests():
    source = data.stdlib(Path("/nowhere"), None, 2048)
    names = [Path(path).as_posix() for path in source.files]
    assert len(names) > 300 and any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "/test/" in name or "/tests/" in name or "site-packages" in name]
    assert source.identity == data.stdlib(Path("/nowhere"), None, 2048).identity


def test_prepared_files_are_used_again_until_the_text_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(stories(50)))
    made = []
    real = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *args: (made.append(1), real(*args)))
    first = data.load(str(path), 300, cache=cache)
    again = data.load(str(path), 300, cache=cache)
    assert len(made) == 1 and first.meta == again.meta and np.array_equal(first.train, again.train)
    path.write_text(path.read_text().replace("Lily", "Lucy"))  # as long as before
    changed = data.load(str(path), 300, cache=cache)
    assert len(made) == 2 and changed.meta["train_sha256"] != first.meta["train_sha256"]
    for name, damage in {"train.bin": b"xx", "val.bin": b"", "tokenizer.json": b"{", "meta.json": b"{"}.items():
        good = (changed.folder / name).read_bytes()
        (changed.folder / name).write_bytes(damage + good[2:] if name == "train.bin" else damage)
        assert data.load(str(path), 300, cache=cache).meta == changed.meta
        assert (changed.folder / name).read_bytes() == good
    assert len(made) == 6 and not [p for p in cache.iterdir() if p.name.endswith(".tmp")]


def test_new_and_edited_files_in_a_folder_are_noticed(tmp_path, cache):
    root = tmp_path / "text"
    name = make_folder(root, stories(30))
    assert data.load(name, 300, cache=root / "cache").meta["documents"] == 30  # a cache inside it is no part of it
    (root / "new.txt").write_text("new")
    with_new = data.load(name, 300, cache=root / "cache")
    assert with_new.meta["documents"] == 31
    (root / "new.txt").write_text("now")
    edited = data.load(name, 300, cache=root / "cache")
    assert edited.meta["documents"] == 31 and edited.meta["source"] != with_new.meta["source"]


def test_processes_that_start_together_prepare_once(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(100))
    code = ("import data, time; real = data.prepare;"
            "data.prepare = lambda *args: (print('made'), time.sleep(1), real(*args));"
            f"print(data.load({name!r}, 300, cache={str(cache)!r}).meta['train_sha256'])")
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(data.__file__).parent)
               for _ in range(3)]
    printed = Counter(line for process in started for line in process.communicate()[0].split())
    assert sorted(printed.values()) == [1, 3] and printed[b"made"] == 1
    names = sorted(path.name for path in cache.iterdir())
    assert names == [".lock", data.load(name, 300, cache=cache).folder.name]


def test_a_killed_preparation_leaves_neither_processes_nor_locks(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(100))
    code = (f"import data, os, signal; data.train_bpe = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
            f"data.load({name!r}, 300, cache={str(cache)!r})")
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE)
    killed.communicate(timeout=20)  # its workers hold the other end of the pipe: it ends when they are gone
    assert killed.returncode == -9 and [p for p in cache.iterdir() if p.name.endswith(".tmp")]
    assert data.load(name, 300, cache=cache).meta["documents"] == 100
    assert not [p for p in cache.iterdir() if p.name.endswith(".tmp")]


def test_bad_input_is_one_line(tmp_path, cache):
    def refused(match, name, vocab_size=300, cache=cache):
        with pytest.raises(data.DataError, match=match) as e:
            data.load(str(name), vocab_size, cache=cache)
        assert "\n" not in str(e.value)

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(stories(50)))
    refused("unknown corpus 'nosuch'.*stdlib, tinystories, cosmopedia.*path", "nosuch")
    refused("256 is not possible", text, 256)
    refused("65,537 is not possible", text, 65537)
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt is empty", tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    refused("binary is not UTF-8 text", tmp_path / "binary")
    (tmp_path / "nul.txt").write_bytes(b"text\0text " * 999)
    refused("nul.txt is not UTF-8 text", tmp_path / "nul.txt")
    (tmp_path / "folder").mkdir()
    refused("0 documents", tmp_path / "folder")
    (tmp_path / "folder" / "one.txt").write_text("one")
    refused("1 documents", tmp_path / "folder")
    (tmp_path / "folder" / "two.txt").write_text("one")
    refused("2 documents: two different", tmp_path / "folder")
    refused("text.txt.*must be a folder that you can write to", text, cache=text)
    refused("must be a folder that you can write to", text, cache=text / "below")


def test_command_line(tmp_path, cache):
    name = make_folder(tmp_path / "text", stories(80))
    run = [sys.executable, data.__file__, "--cache", str(cache), "--vocab-size", "300"]
    done = subprocess.run([*run, name], capture_output=True, text=True)
    assert done.returncode == 0
    for what in "80 documents", "bytes a token", "bits a byte", "Longest tokens", "|":
        assert what in done.stdout
    corpus = data.load(name, 300, cache=cache)
    counts = Counter(corpus.train.tolist())
    entropy = -sum(n / len(corpus.train) * np.log2(n / len(corpus.train)) for n in counts.values())
    assert f"{entropy * corpus.meta['train_tokens'] / corpus.meta['train_bytes']:.3f} bits a byte" in done.stdout
    done = subprocess.run([*run, "nosuch"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("data.py: unknown corpus") and done.stderr.count("\n") == 1
    with subprocess.Popen([*run, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # | head, which has gone
        assert process.wait(60) == 1 and process.stderr.read() == b""


def test_preparing_needs_no_torch():
    code = "import sys, data; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, from a web server of our own


class Hub:
    """A hub that redirects to a storage on another host name, as the real one does. `faults` is used up a request at a
    time: a status, ("cut", bytes), ("stall", bytes), "no range", ("retry after", value), "forever 500", a function."""

    def __init__(self):
        self.files, self.rows, self.faults, self.requests, self.linked, self.redirect = {}, [], [], [], True, 302
        self.revision, self.closing = "r1", threading.Event()
        self.knows_range, self.etag, self.linked_etag = True, None, None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def answer(self, handler):
        url = urlsplit(handler.path)
        self.requests.append((handler.path, dict(handler.headers)))

        stalls = False

        def send(status, body=b"", cut=None, **headers):
            handler.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                handler.send_header(key.replace("_", "-"), str(value))
            handler.end_headers()
            handler.wfile.write(body[:cut])
            if stalls:
                handler.wfile.flush()
                self.closing.wait(20)

        name = url.path.rsplit("/", 1)[1]
        if "/resolve/" in url.path and name in self.files and self.redirect:
            etag = self.linked_etag or hashlib.sha256(self.files[name]).hexdigest()
            linked = {"X_Linked_Size": len(self.files[name]), "X_Linked_Etag": f'"{etag}"'} if self.linked else {}
            return send(self.redirect, b"moved", Location=f"http://localhost:{self.port}/storage/{name}", **linked)
        fault = self.faults[0] if self.faults else None
        if self.faults and fault != "forever 500":
            self.faults.pop(0)
        fault = fault() if callable(fault) else fault
        if fault == "forever 500":
            return send(500)
        if isinstance(fault, int):
            return send(fault)
        if fault and fault[0] == "retry after":
            return send(429, Retry_After=fault[1])
        cut = fault[1] if fault and fault[0] in ("cut", "stall") else None
        stalls = fault and fault[0] == "stall"
        if url.path == "/rows":
            query = {key: value[0] for key, value in parse_qs(url.query).items()}
            assert (query["dataset"], query["config"]) == ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2")
            assert query["length"] == "100"
            offset = int(query["offset"])
            page = [{"row_idx": offset + i, "row": {"text": text}, "truncated_cells": []}
                    for i, text in enumerate(self.rows[offset:offset + 100])]
            body = json.dumps({"rows": page, "num_rows_total": len(self.rows), "partial": False}).encode()
            return send(200, body, cut, X_Revision=self.revision)
        if name not in self.files:
            return send(404)
        body = self.files[name]
        etag = f'"{self.etag or hashlib.md5(body).hexdigest()}"'
        if "Range" in handler.headers and fault != "no range" and self.knows_range:
            first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(body)), len(body) - 1)
            if first >= len(body):
                return send(416, Content_Range=f"bytes */{len(body)}")
            return send(206, body[first:last + 1], cut, ETag=etag, Content_Range=f"bytes {first}-{last}/{len(body)}")
        return send(200, body, cut, ETag=etag)

    def ranges(self):
        return [headers["Range"] for path, headers in self.requests if path.startswith("/storage/")]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(data, "HUB", hub.url)
    monkeypatch.setattr(data, "ROWS", hub.url)
    monkeypatch.setattr(data, "PATIENCE", 0.001)
    for key in "HTTP_PROXY", "http_proxy", "HF_TOKEN":
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.closing.set()
    hub.server.shutdown()
    hub.server.server_close()


def fetch(hub, path, want=None, name="f.txt"):
    data.download(path, want, data.fetch_file, f"{hub.url}/datasets/x/resolve/main/{name}")
    return path.read_bytes()


ROWS_QUERY = "/rows?dataset=HuggingFaceTB%2Fsmollm-corpus&config=cosmopedia-v2"
BODY = random.Random(0).randbytes(1_000_000)


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("redirect", [301, 302, 307, 308, 0])
def test_download_follows_redirects_and_grows(hub, tmp_path, redirect, linked):
    hub.files["f.txt"], hub.redirect, hub.linked = BODY, redirect, linked
    path = tmp_path / "deep" / "f.txt"
    assert fetch(hub, path, 1000) == BODY[:1000]
    assert fetch(hub, path, 500) == BODY[:1000] and fetch(hub, path, 1000) == BODY[:1000]  # enough is there
    asked = len(hub.requests)
    assert fetch(hub, path, 600_000) == BODY[:600_000]
    assert fetch(hub, path, 5_000_000) == BODY and fetch(hub, path) == BODY and fetch(hub, path, 9_000_000) == BODY
    assert [headers["Range"] for p, headers in hub.requests if not redirect or "/storage/" in p] == [
        "bytes=0-999", "bytes=1000-599999", "bytes=600000-4999999"]
    assert len(hub.requests) == asked + (4 if redirect else 2)
    assert sorted(p.name for p in path.parent.iterdir()) == ["f.txt", "f.txt.json"]


@pytest.mark.parametrize("faults", [
    [("cut", 1000)], [("cut", 0), ("cut", 10), ("cut", 262_144)], ["no range"], [("cut", 5000), "no range"],
    [("cut", 5000), ("cut", 5000), "no range"], [("retry after", "0")], [429, 500, 503],
    [("cut", 1000), 502, ("cut", 77), 429], [("cut", 1000)] * 20, [416]], ids=str)
def test_download_survives_faults(hub, tmp_path, faults):
    hub.files["f.txt"], hub.faults = BODY, faults
    assert fetch(hub, tmp_path / "f.txt") == BODY
    if faults == [("cut", 1000)]:
        assert hub.ranges() == ["bytes=0-", "bytes=1000-"]  # it went on, and did not start again


@pytest.mark.parametrize("value", ["2", "a date", "nonsense"])
def test_retry_after_is_obeyed(hub, tmp_path, value, monkeypatch):
    value = email.utils.formatdate(time.time() + 3, usegmt=True) if value == "a date" else value
    hub.files["f.txt"], hub.faults, slept = BODY, [("retry after", value)], []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert fetch(hub, tmp_path / "f.txt") == BODY
    assert (1 < slept[0] < 4) == (value != "nonsense") and len(slept) == 1


def test_download_gives_up_in_one_line_and_resumes_later(hub, tmp_path):
    hub.files["f.txt"], hub.faults = BODY, [("cut", 12345), "forever 500"]
    with pytest.raises(data.DataError, match=r"f.txt from .*HTTP 500.* put it at .*f.txt by hand.*--data stdlib") as e:
        fetch(hub, tmp_path / "f.txt")
    assert "\n" not in str(e.value) and not (tmp_path / "f.txt").exists()
    assert len(hub.requests) == 2 * (1 + data.TRIES - 1)
    hub.faults, hub.requests = [], []
    assert fetch(hub, tmp_path / "f.txt") == BODY and hub.ranges() == ["bytes=12345-"]


def test_a_killed_download_goes_on_where_it_was(hub, tmp_path):
    hub.files["f.txt"], hub.faults, path = BODY, [("stall", 700_000)], tmp_path / "f.txt"
    code = f"import data; data.download(data.Path({str(path)!r}), None, data.fetch_file, '{hub.url}/resolve/f.txt')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(data.__file__).parent)
    part = tmp_path / "f.txt.part"
    while not part.exists() or part.stat().st_size < 500_000:
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert not path.exists() and json.loads((tmp_path / "f.txt.json").read_text())["version"]
    assert fetch(hub, path) == BODY and hub.ranges()[-1] == f"bytes={have}-"
    hub.files["g.txt"] = BODY  # without the note nobody knows which version the beginning is of
    (tmp_path / "g.txt.part").write_bytes(b"something else")
    assert fetch(hub, tmp_path / "g.txt", 1000, "g.txt") == BODY[:1000]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_asked_again(hub, tmp_path, status):
    hub.files["f.txt"], hub.faults = BODY, [status]
    with pytest.raises(data.DataError, match=f"HTTP {status}"):
        fetch(hub, tmp_path / "f.txt")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_that_changes_between_two_requests_is_never_mixed(hub, tmp_path, linked):
    new = BODY[::-1]

    def change():
        hub.files["f.txt"] = new

    hub.files["f.txt"], hub.faults, hub.linked = BODY, [("cut", 5000), 503, change], linked
    assert fetch(hub, tmp_path / "f.txt") == new
    hub.files["f.txt"] = BODY  # and between two runs: what is whole stays, what has to grow starts again
    assert fetch(hub, tmp_path / "f.txt") == new
    hub.files["g.txt"] = BODY
    assert fetch(hub, tmp_path / "g.txt", 1000, "g.txt") == BODY[:1000]
    hub.files["g.txt"] = new
    assert fetch(hub, tmp_path / "g.txt", 2000, "g.txt") == new[:2000]
    hub.files["h.txt"] = BODY
    assert fetch(hub, tmp_path / "h.txt", 5000, "h.txt") == BODY[:5000]
    hub.files["h.txt"] = BODY[:3000]  # it became shorter than what is here
    assert fetch(hub, tmp_path / "h.txt", 9000, "h.txt") == BODY[:3000]


def test_a_file_that_changes_all_the_time_ends_in_an_error(hub, tmp_path):
    def change():
        hub.files["f.txt"] = random.randbytes(20_000)
        return "cut", 100

    hub.files["f.txt"], hub.linked, hub.faults = BODY, False, [change] * 1000
    with pytest.raises(data.DataError, match="cannot fetch"):
        fetch(hub, tmp_path / "f.txt")


def test_a_server_without_ranges_serves_from_the_start(hub, tmp_path):
    hub.files["f.txt"], hub.knows_range, hub.faults = BODY, False, [("cut", 5000)]
    assert fetch(hub, tmp_path / "f.txt", 600_000) == BODY[:600_000]
    assert fetch(hub, tmp_path / "f.txt") == BODY


def test_content_that_does_not_have_its_hash_is_refused(hub, tmp_path):
    hub.files["f.txt"], hub.linked_etag, hub.etag = BODY, "0" * 64, hashlib.sha256(BODY).hexdigest()
    with pytest.raises(data.DataError, match="hash"):
        fetch(hub, tmp_path / "f.txt")
    assert not (tmp_path / "f.txt").exists()
    hub.linked_etag, hub.etag = None, "f" * 64  # the storage's own ETag may be anything
    assert fetch(hub, tmp_path / "f.txt") == BODY
    hub.files["g.txt"], hub.linked = BODY, False
    assert fetch(hub, tmp_path / "g.txt", name="g.txt") == BODY


def test_a_small_file_is_checked_against_the_hash_that_git_has(hub, tmp_path):
    hub.files["f.txt"], hub.redirect, hub.etag = BODY, 0, hashlib.sha1(BODY).hexdigest()
    with pytest.raises(data.DataError, match="hash"):
        fetch(hub, tmp_path / "f.txt")
    hub.etag = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY).hexdigest()
    assert fetch(hub, tmp_path / "f.txt") == BODY


def test_a_damaged_download_is_noticed(hub, tmp_path):
    hub.files["f.txt"] = BODY
    path = tmp_path / "f.txt"
    fetch(hub, path, 1000)
    path.write_bytes(BODY[:400])
    with pytest.raises(data.DataError, match="has 400 bytes, 1,000 were fetched"):
        fetch(hub, path, 1000)


def test_a_file_put_there_by_hand_is_taken(hub, tmp_path):
    (tmp_path / "f.txt").write_bytes(b"mine")
    assert fetch(hub, tmp_path / "f.txt") == b"mine" and not hub.requests


def test_without_a_network_it_says_at_once_what_to_do(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(data, "ROWS", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    monkeypatch.setenv("no_proxy", "*")
    for name, file in ("tinystories", "TinyStoriesV2-GPT4-valid.txt"), ("cosmopedia", "cosmopedia-v2.txt"):
        with pytest.raises(data.DataError, match=f"{file} .*by hand.*--data stdlib") as e:
            data.load(name, 49_152, cache=cache)
        assert "\n" not in str(e.value) and str(cache / "downloads" / file) in str(e.value)


def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch):
    hub.files["f.txt"] = BODY
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path / "f.txt")
    (first, at_hub), (second, at_storage) = hub.requests
    assert "/resolve/" in first and at_hub["Authorization"] == "Bearer hf_secret"
    assert "/storage/" in second and "hf_secret" not in str(at_storage) and at_storage["Range"] == "bytes=0-"


def test_proxies_of_the_environment_are_used(hub, tmp_path, monkeypatch):
    hub.files["f.txt"], hub.redirect = BODY, 0
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", hub.url)
    data.download(tmp_path / "f.txt", None, data.fetch_file, "http://hub.invalid/resolve/main/f.txt")
    assert hub.requests[0][0] == "http://hub.invalid/resolve/main/f.txt" and (tmp_path / "f.txt").read_bytes() == BODY


def test_endpoints_come_from_the_environment():
    code = "import data; print(data.HUB, data.ROWS)"
    run = lambda **env: subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, text=True,
                                       capture_output=True, env={**os.environ, **env}).stdout.split()
    assert run(HF_ENDPOINT="https://mirror.net/") == ["https://mirror.net", "https://datasets-server.mirror.net"]
    assert run(HF_ENDPOINT="https://a", HF_DATASETS_SERVER="http://b/") == ["https://a", "http://b"]


def test_tinystories_end_to_end(hub, cache):
    train, valid = stories(6000), stories(40, seed=1)
    train[3] = valid[5]  # a validation story that stands in the training file too
    text = f"\n{EOT}\n".join(train).encode()
    hub.files["TinyStoriesV2-GPT4-train.txt"] = text
    hub.files["TinyStoriesV2-GPT4-valid.txt"] = f"\n{EOT}\n".join(valid).encode()
    small = data.load("tinystories", 300, n_tokens=100_000, cache=cache)
    assert small.folder.name == "tinystories-1MB-300" and small.meta["dropped_documents"] == 1
    fetched = (cache / "downloads" / "TinyStoriesV2-GPT4-train.txt").stat().st_size
    assert fetched == 1 << 20 and len(text) > fetched
    got = token_documents(small, "train")
    assert got == [story for story in train[:len(got) + 1] if story not in valid] and len(got) > 1000  # all whole
    assert sorted(token_documents(small, "val")) == sorted(valid)
    check_meta(small)
    asked = len(hub.requests)
    assert data.load("tinystories", 300, n_tokens=50_000, cache=cache).meta == small.meta and len(hub.requests) == asked
    whole = data.load("tinystories", 300, cache=cache)
    assert token_documents(whole, "train") == [story for story in train if story not in valid]
    assert hub.ranges()[-1] == f"bytes={1 << 20}-"
    again = data.load("tinystories", 310, n_tokens=100_000, cache=cache)
    assert token_documents(again, "train") == got  # of the file that has grown, no more than asked


def test_cosmopedia_end_to_end(hub, cache):
    hub.rows = [" ".join(stories(25, seed=i)) for i in range(250)]
    published = data.train_bpe(count_pieces(" ".join(hub.rows[:50])), 400)
    hub.files["tokenizer.json"] = json.dumps(published.spec).encode()
    hub.faults = [429, ("cut", 1000), ("retry after", "0")]
    corpus = data.load("cosmopedia", 49_152, n_tokens=100_000, cache=cache)
    offsets = [parse_qs(urlsplit(path).query)["offset"][0] for path, _ in hub.requests if path.startswith("/rows")]
    assert offsets == ["0"] * 4 + ["100"] and corpus.tokenizer.spec == published.spec
    got = token_documents(corpus, "train") + token_documents(corpus, "val")
    assert 140 < len(got) <= 200 and set(got) <= set(hub.rows[:200])
    check_meta(corpus)
    more = data.load("cosmopedia", 300, n_tokens=1_000_000, cache=cache)  # more than there is: to the end of the rows
    assert sorted(token_documents(more, "train") + token_documents(more, "val")) == sorted(hub.rows)
    assert [path for path, _ in hub.requests if "offset=200" in path] and more.tokenizer.vocab_size == 300


def test_a_page_of_rows_that_was_cut_on_this_side_is_fetched_again(hub, tmp_path):
    hub.rows, path = [f"row {i} " + "x" * 9000 for i in range(300)], tmp_path / "rows.txt"
    arguments = data.fetch_rows, hub.url + ROWS_QUERY
    data.download(path, 1 << 20, *arguments)
    path.rename(tmp_path / "rows.txt.part")
    with open(tmp_path / "rows.txt.part", "a") as file:
        file.write("half a row")
    data.download(path, 1 << 23, *arguments)
    assert [d.strip() for d in path.read_text().split(EOT)][:-1] == hub.rows


def test_rows_of_two_revisions_are_never_mixed(hub, tmp_path):
    old, hub.rows = [f"old {i} " + "x" * 9000 for i in range(300)], [f"new {i} " + "x" * 9000 for i in range(300)]
    new, hub.rows = hub.rows, old

    def change():
        hub.rows, hub.revision = new, "r2"

    hub.faults = [None, change]
    path = tmp_path / "rows.txt"
    data.download(path, 1 << 21, data.fetch_rows, hub.url + ROWS_QUERY)
    text = path.read_text()
    assert "old" not in text and [d.strip() for d in text.split(EOT)][:-1] == new
