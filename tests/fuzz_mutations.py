"""Damages to valid files: flips, cuts, huge sizes in heads, deep nesting, duplicate keys, odd text, foreign paths."""

import gzip
import io
import json
import random
import struct
import zipfile

VALUES = [
    *(None, True, False, 0, -1, 1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 10**12, -(2**63), 10**30),
    *(
        0.5,
        -0.0,
        1e-320,
        1e308,
        -1e308,
        "",
        "x",
        "0",
        "1",
        "\x00",
        "\x1b[2J\x1b]0;title\x07",
        "\u202egnp.exe",
        "\ud800",
    ),
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "a/b", "²", "é" * 300, "x" * 5000),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, [None], {"": {"": {}}}, [2**40, 2**40], [0], [-1], ["x"] * 50),
]
"""What takes the place of a value."""

LITERALS = [
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        b"9" * 5000,
        b"9" * 25,
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
    ),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b'"\\u0000"', b'"\\u001b[31m"', b"\xff", b"// x"),
]
"""What JSON has no value for, or Python trouble with."""

CHUNKS = [
    *(b"\x00" * 8, b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 2**40), struct.pack("<I", 2**31 - 1)),
    *(struct.pack("<i", 1), struct.pack("<i", -1), struct.pack(">I", 2**31), b"\x80\x04", b"PK\x03\x04", b"\x93NUMPY"),
    *(
        b"\xef\xbb\xbf",
        b"\x00",
        b"\n",
        b'"',
        b",",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"../",
        b"\x1b[2J",
        b"\xc6\xff\xff\xff\xff",
    ),
]
"""Bytes that are put in anywhere."""


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file; what kind of file it is decides which damages there are beside those of bytes."""
    kinds = [_bytes, _bytes]
    if seed[:1] in b"{[" and seed[:1]:
        kinds += [_json] * 6
    elif seed[8:9] == b"{":
        kinds += [_safetensors] * 6
    elif seed[:6] == b"\x93NUMPY":
        kinds += [_npy] * 6
    elif seed[:4] == b"PK\x03\x04":
        kinds += [_zip] * 5
    elif seed[:2] == b"\x1f\x8b":
        kinds += [_gzip] * 4
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.choice(kinds)
        try:
            seed = kind(seed, rng)
        except Exception:  # an earlier damage left nothing of its kind
            seed = _bytes(seed, rng)
    return seed


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    if rng.random() < 0.5:  # a head decides more than the rest
        at = min(at, rng.randint(0, 64))
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:end] + data[at:]
        case 3 | 4:
            chunk = rng.choice(CHUNKS)
            return data[:at] + chunk + data[at + rng.choice([0, len(chunk)]) :]
        case 5:
            return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at + rng.randint(0, 16) :]
        case 6:
            return rng.choice([b"", b"{}", b"[]", b"null", b"0", rng.randbytes(200), data + data, data + b"\n"])
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _json(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    if len(lines) > 2 and lines[0].endswith(b"}"):  # JSON lines
        at = rng.randrange(len(lines))
        if not lines[at]:
            return b"\n".join(lines[: at + 1] + lines)
        lines[at] = _json(lines[at], rng)
        return b"\n".join(lines)
    tree = json.loads(data)
    places = [*_places(tree)]
    if not places:
        return _bytes(data, rng)
    parent, key = rng.choice(places)
    mark = "@@fuzz@@"
    match rng.randrange(7):
        case 0:
            del parent[key]
        case 1:
            parent[key], replaced = mark, parent[key]
            literal = rng.choice(LITERALS)
            if rng.random() < 0.2:  # the same key twice
                literal = json.dumps(replaced).encode() + b', "%s": 1' % str(key).encode("utf-8", "replace")
            return json.dumps(tree).encode().replace(json.dumps(mark).encode(), literal, 1)
        case 2 if isinstance(parent, dict):
            parent[rng.choice(["", "x", "type", "__metadata__", "config", "auto_map", "\x1b[31m", str(key) * 2])] = (
                parent[key]
            )
        case 3 if isinstance(parent, list):
            parent.extend(parent[:20] * rng.choice([1, 5]))
        case 4:
            other, place = rng.choice(places)
            parent[key] = json.loads(
                json.dumps(other.get(place) if isinstance(other, dict) else other[place : place + 1])
            )
        case _:
            parent[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def _places(tree):
    """(container, key) of every value, at any depth."""
    left = [tree]
    while left:
        parent = left.pop()
        for key, value in [*parent.items()] if isinstance(parent, dict) else [*enumerate(parent)][:100]:
            yield parent, key
            if isinstance(value, dict | list) and value:
                left.append(value)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    head = _json(data[8 : 8 + length], rng) if rng.random() < 0.8 else data[8 : 8 + length]
    given = rng.choice([len(head)] * 8 + [0, 2**63, 2**64 - 1, len(head) - 1, len(head) * 10, 10**8])
    return struct.pack("<Q", given) + head + data[8 + length :]


def _npy(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<H", data[8:10])
    head = data[10 : 10 + length].decode()
    shapes = [
        "(1000000000000,)",
        "(4611686018427387904, 4)",
        "(-1,)",
        "(0,)",
        "()",
        "(3, 0, 99999999999)",
        "1",
        "('a',)",
    ]
    types = [
        "'|O'",
        "'<U1000000000'",
        "'<U0'",
        "'<f8'",
        "'|V16'",
        "[('a', '<U1')]",
        "'M8[s]'",
        "'<U4'",
        "'|S1'",
        "None",
    ]
    key, value = rng.choice([("'shape': (", s) for s in shapes] + [("'descr': '", t) for t in types])
    end = head.index(")" if key.endswith("(") else "'", head.index(key) + len(key)) + 1
    head = head[: head.index(key) + len(key) - 1] + value + head[end:]
    body = head.encode()
    return data[:8] + struct.pack("<H", len(body)) + body + data[10 + length :]


def _gzip(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return gzip.compress(rng.choice([b"x", b"x\n", b"\n"]) * (5 * 10**6))
    return gzip.compress(mutate(gzip.decompress(data), rng)) + rng.choice([b"", b"", b"x"])


def _zip(data: bytes, rng: random.Random) -> bytes:
    """Another archive of the same members, of which one is damaged, packed or gone."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content, how, called = old.read(name), zipfile.ZIP_STORED, name
            if name == chosen:
                match rng.randrange(6):
                    case 0:
                        continue
                    case 1:
                        content, how = bytes(rng.choice([10**5, 10**8])), zipfile.ZIP_DEFLATED
                    case 2:
                        called = rng.choice(["../../escaped", "/tmp/escaped", name + "/", "", "a\\b"])
                    case 3:
                        how = zipfile.ZIP_DEFLATED
                    case _:
                        content = mutate(content, rng)
            new.writestr(called, content, how)
    packed = bytearray(made.getvalue())
    if rng.random() < 0.2:  # a size that the directory declares
        at = packed.rfind(b"PK\x01\x02")
        packed[at + 20 : at + 28] = struct.pack("<II", rng.choice([0, 2**32 - 1, 2**31]), 2**32 - 1)
    return bytes(packed)
