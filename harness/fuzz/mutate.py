"""Spoils valid texts: bit by bit, piece by piece, and as trees of JSON or YAML. Every choice comes from the given Random."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import yaml

MARKER = "pwned"  # the file that an executed payload leaves
DEEP = 3000  # levels: beyond Python's recursion limit of 1000
LONG = 5000  # digits: beyond Python's limit of 4300
_CALL = f"!!python/object/apply:os.system ['touch {MARKER}']"
LAUGHS = "\n".join(["l0: &l0 [lol, lol]"] + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)])

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "0", "-1", "inf", "nan", "x" * 5000, "../../outside/secret", "/etc/passwd", "repro.py\0", "\ud800"),
    *("\u202e", "[red]", "\x1b[2J", "PASSED", "cpu", "bf16", "٣"),
    *([], {}, [[]], [None], {"": None}, [1, "2", 3.0], {"a": {"b": {"c": []}}}),
)
JSON_TOKENS = (
    *("1e999", "-1e999", "NaN", "Infinity", "9" * LONG, "-" + "9" * 30, "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP),
    *('"\\ud800"', '"\\u0000"', '"\\x"', "'", ",", "//", "0x10", "01", "1.", "+1", '"', '"a":1,"a":2'),
    *("\x00", "\ufeff", "\u2028"),
)
YAML_TOKENS = (
    *(_CALL, "!!python/name:os.system", "!!python/module:os", "!<tag:yaml.org,2002:python/tuple> [1]", "!unknown x", LAUGHS),
    *("&a [*a]", "*nowhere", "{[1]: 2}", "? [a, b]\n: c", "{{}: 1}", "<<: [1]", "<<: {name: x}", "2001-99-99", "!!timestamp x"),
    *("!!float abc", "!!int x", "!!bool maybe", "!!binary x", "!!set {a}", "!!omap [a]", "!!null x", ".inf", ".nan", "1e999"),
    *("9" * LONG, "0x" + "f" * LONG, "0b2", "1:99:99", "~", "[" * 300, "[" * DEEP, "- " * DEEP, "{a: " * 200),
    *("%YAML 9.9", "--- x", "---\na", "...", "\t", "\x00", "\x85", "\u2028", "\ufeff", "|2\n x", ">", "'", '"', "@", "`"),
    *("# ", ": ", "- "),
)
CASE_TOKENS = (
    *(".", "..", "moe", ".s", ".t", ".k0", ".e", "9" * 20, "9" * LONG, "٣", "²", "-", "-1", "+1", "0", "00", " ", "\n"),
    *("\x00", "\ud800", "\udcff", "é", "*", "[red]", "{}", "%s", "../", "nvfp4", "mxfp4-fp16", "deepseek_v3"),
    "bf16-bf16-bf16-bf16-bf16",
)
BYTES = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5", b"\n", b"\r", b"\x1b[2J", b"\xef\xbb\xbf", b"PK\x03\x04")


def spoiled(random: Random, data: bytes) -> bytes:
    """`data` with one to four local changes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 2, 8, 64, 1024)))
        change = random.randrange(7)
        if change == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        elif change == 1:
            data = data[:at] + data[end:]
        elif change == 2:
            data = data[:end] + data[at:]
        elif change == 3:
            data = data[:at]
        elif change == 4:
            data = data[:at] + random.choice(BYTES) + data[at:]
        elif change == 5:
            data = data[:at] + bytes(random.randrange(256) for _ in range(random.randrange(16))) + data[end:]
        else:
            other = random.randrange(len(data) + 1)
            data = data[:at] + data[other : other + end - at] + data[end:]
    return data


def inserted(random: Random, text: str, tokens: tuple[str, ...]) -> str:
    """`text` with one of the tokens at some place, or instead of some characters or of a whole word."""
    at = random.randrange(len(text) + 1)
    end = at + random.choice((0, 0, 1, 5))
    if random.randrange(2):
        starts = [i for i in range(1, len(text)) if text[i - 1] in " [{:,\n" and text[i] not in " \n"]
        at = random.choice(starts) if starts else at
        end = next((i for i in range(at, len(text)) if text[i] in ",]}\n"), len(text))
    return text[:at] + random.choice(tokens) + text[end:]


def altered(random: Random, tree: Any) -> Any:
    """A copy of a tree of dicts and lists in which one node is replaced, dropped, moved, wrapped or renamed."""
    tree = {"": copy.deepcopy(tree)}
    places = list(_places(tree))
    for _ in range(random.choice((1, 1, 2))):
        holder, key = random.choice(places)
        change = random.randrange(6)
        if change < 3 or holder is tree:
            _put(holder, key, copy.deepcopy(random.choice(VALUES)))
        elif change == 3 and key in _keys(holder):
            del holder[key]
        elif change == 4 and isinstance(holder, dict) and key in holder:
            holder[random.choice(("", "x", "name", "schema", "\ud800", "../x"))] = holder.pop(key)
        else:
            other, place = random.choice(places)
            _put(holder, key, copy.deepcopy(other[place]) if place in _keys(other) else [])
    return tree.get("")


def json_text(random: Random, data: bytes) -> bytes:
    """A JSON text spoiled as bytes, as text or as a tree."""
    kind = random.randrange(4)
    if kind == 0:
        return spoiled(random, data)
    if kind == 1:
        return inserted(random, data.decode(), JSON_TOKENS).encode()
    return json.dumps(altered(random, json.loads(data))).encode()


def yaml_text(random: Random, data: bytes) -> bytes:
    """A YAML text spoiled in the same ways."""
    kind = random.randrange(4)
    if kind == 0:
        return spoiled(random, data)
    if kind < 3:
        return inserted(random, data.decode(), YAML_TOKENS).encode(errors="surrogatepass")
    return yaml.safe_dump(altered(random, yaml.safe_load(data)), allow_unicode=bool(random.randrange(2))).encode(
        errors="surrogatepass"
    )


def _places(tree: Any) -> Any:
    """(holder, key) of every node below `tree`."""
    for key in _keys(tree):
        yield tree, key
        yield from _places(tree[key])


def _keys(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict) or key in _keys(holder):
        holder[key] = value
