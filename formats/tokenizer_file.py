"""umT5's tokenizer.json, and no other: the library that reads it takes any rule, and some of them take gigabytes, or for ever, or end the program.

Of the file only what is used goes on to the library: the pieces with their scores, special tokens, and how text is cut before it is looked up.
"""
import base64
import json

import numpy as np
import tokenizers

FILE_BYTES = 2**25           # umT5's has 16.8 million bytes
PIECE_BYTES = 2**22          # of all pieces together, umT5's have 2 million; the library takes up to 340 bytes for each
PIECES = 2**19               # umT5 has 256,300
RULES = {"normalizer": ("Precompiled", "Strip", "Replace"), "pre_tokenizer": ("Metaspace", "WhitespaceSplit")}
PATTERN = {"Regex": " {2,}"}                                         # the one regular expression of umT5: runs of spaces


def read_tokenizer(path):
    """tokenizer.json -> tokenizers.Tokenizer.  raises ValueError for a file that is no such, OSError"""
    with open(path, "rb") as file:
        data = file.read(FILE_BYTES + 1)
    want(len(data) <= FILE_BYTES, f"at most {FILE_BYTES >> 20} MiB", "more")
    try:
        fields = json.loads(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    want(isinstance(fields, dict), "a JSON object", type(fields).__name__)
    model, added = fields.get("model"), fields.get("added_tokens")
    kind = model.get("type") if isinstance(model, dict) else model
    want(kind == "Unigram" and isinstance(model, dict), "a Unigram model, as umT5's", kind)
    check_pieces(model.get("vocab"))
    want(isinstance(added, list) and len(added) <= 2000 and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and 0 < len(token["content"]) <= 100 for token in added),
        "a list of added_tokens", added)
    rules = {name: check_rules(fields.get(name), allowed) for name, allowed in RULES.items()}
    kept = dict(version=fields.get("version"), truncation=None, padding=None, post_processor=None, decoder=None, added_tokens=added, model=model)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(kept | rules))
    except Exception as error:                                       # the library raises nothing more specific
        raise ValueError(str(error)) from None


def want(ok, wanted, got):
    if not ok:
        raise ValueError(f"wanted {wanted}, got {repr(got)[:60]}")


def check_pieces(vocab):
    """[[piece, score], ...]"""
    want(isinstance(vocab, list) and 0 < len(vocab) <= PIECES, f"1 to {PIECES} pieces", len(vocab) if isinstance(vocab, list) else vocab)
    for pair in vocab:
        want(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, float) and abs(pair[1]) < 1e6,
             "a piece and its score", pair)
    size = sum(len(piece.encode(errors="replace")) for piece, _ in vocab)
    want(size <= PIECE_BYTES, f"pieces of at most {PIECE_BYTES >> 20} MiB together", f"{size / 2**20:.1f} MiB")


def check_rules(rule, allowed):
    """One rule, a sequence of them, or none -> the same"""
    steps = [rule]
    if isinstance(rule, dict) and rule.get("type") == "Sequence":
        steps = rule.get("normalizers", rule.get("pretokenizers"))
        want(isinstance(steps, list) and len(steps) <= 8, "a sequence of up to 8 rules", steps)
    for step in steps if rule is not None else ():
        want(isinstance(step, dict) and step.get("type") in allowed, f"a rule of {', '.join(allowed)}", step)
        if step["type"] == "Replace":
            want(step.get("pattern") == PATTERN and step.get("content") in (" ", "\u2581"), "runs of spaces replaced by one", step)
        if step["type"] == "Precompiled":
            check_charsmap(step.get("precompiled_charsmap"))
    return rule


def check_charsmap(text):
    """SentencePiece's table of letters, in base64: the bytes of a double-array trie, the trie, and the texts that its leaves point into.

    The library follows it without looking and ends the program where it points beyond its end, so every step is checked here.
    """
    want(isinstance(text, str), "text as precompiled_charsmap", text)
    data = base64.b64decode(text, validate=True)
    size = int.from_bytes(data[:4], "little")
    want(len(data) >= 4 and 0 < size <= len(data) - 4 and size % 1024 == 0, "a charsmap with a whole trie", f"{len(data)} bytes")
    units, texts = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), np.frombuffer(data, np.uint8, offset=4 + size)
    bytes(texts).decode()                                            # UnicodeDecodeError is a ValueError
    base = np.arange(len(units)) ^ (units >> 10) << ((units & 1 << 9) >> 6)     # where the letters that follow a node stand
    node = units >> 31 == 0                                          # the others are values
    want((base[node] | 255).max(initial=0) < len(units), "a charsmap whose trie stays within itself", "one that leaves it")
    values = units[base[node & (units >> 8 & 1 == 1)]] & (1 << 31) - 1
    want(values.max(initial=0) < max(1, len(texts)) and not np.any(texts[values] >> 6 == 2) if len(values) else True,
         "a charsmap whose leaves point at its texts", "one that points elsewhere")
