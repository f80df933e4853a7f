"""Changes that somebody who can write to a bucket makes: to JSON documents, tensor files, and manifests that match."""

import copy
import hashlib
import json
import math
import random

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

JUNK = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**62,
        2**64,
        -(2**70),
        10**400,
        0.5,
        -0.0,
        1e300,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *(
        "",
        "x",
        "0",
        "\ud800",
        "\0",
        "../..",
        "/etc/passwd",
        "file:///etc/passwd",
        "s3://b/../c",
        "\x1b[2J\nok",
        "9" * 5000,
    ),
    *([], {}, [[]], [None], {"x": {}}, {"": 0}, ["x"] * 50, [0] * 2000, [math.nan] * 3),
]


def _nested(depth):
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


def _places(value, above=()):
    """Every place in a document, as a path."""
    yield above
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:8] if isinstance(value, list) else ())
    for name, part in pairs:
        yield from _places(part, (*above, name))


def changed(document, draw):
    """The document with one to three changes."""
    found = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([*_places(found)])
        junk = copy.deepcopy(draw.choice([*JUNK, _nested(50), _nested(900)]))
        if not path:
            if draw.random() < 0.1:
                return junk
            continue
        holder = found
        for name in path[:-1]:
            holder = holder[name]
        how = draw.random()
        if how < 0.2:
            del holder[path[-1]]
        elif how < 0.3 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        elif how < 0.4 and isinstance(holder, dict):
            holder[draw.choice(["x", "step", "files", "\ud800", ""])] = junk
        else:
            holder[path[-1]] = junk
    return found


def written(document):
    """As JSON, also what JSON does not know."""
    return json.dumps(document).encode()


def documents(document):
    """Of a JSON document many that are not what is written there, as bytes."""
    whole = written(document)
    cut = st.integers(0, len(whole) - 1).map(lambda at: whole[:at])
    deep = st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"", b"null", b"[]", b"{}", b"NaN"])
    mutated = st.integers(0, 2**32).map(lambda seed: written(changed(document, random.Random(seed))))
    return st.one_of(mutated, mutated, mutated, mutated, cut, deep)


def change_tensors(path, draw):
    """Another safetensors file in its place: other names, shapes, types, values; or none at all."""
    kind = draw.choice(["cut", "bytes", "tensors", "tensors", "tensors"])
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
        return
    if kind == "bytes":
        at = draw.randrange(min(len(content), 400))
        path.write_bytes(content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :])
        return
    tensors = load_file(path) or {"0.exp_avg": torch.zeros(3)}
    for _ in range(draw.randint(1, 2)):
        if tensors:
            _change_one(tensors, draw)
    save_file(tensors, path)


def _change_one(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    nan = torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor + 1
    other_type = draw.choice([torch.float64, torch.float16, torch.uint8, torch.bool])
    other_name = draw.choice(["x", "9.exp_avg", "0.", "nll.99", "nll.-1", f"{name}.x"])
    tensors |= draw.choice(
        [
            {},
            {other_name: tensor},
            {name: tensor, "0.more": torch.zeros(2)},
            {name: torch.cat([tensor.reshape(-1)] * 2)},
            {name: tensor.reshape(1, -1).clone()},
            {name: tensor.to(other_type)},
            {name: nan},
            {name: torch.zeros(0)},
        ]
    )


def reseal(checkpoint):
    """A manifest that names what the folder holds now."""
    path = checkpoint / "MANIFEST.json"
    content = json.loads(path.read_text())
    content["files"] = {
        name: {"size": len(data := (checkpoint / name).read_bytes()), "sha256": hashlib.sha256(data).hexdigest()}
        for name in content["files"]
    }
    path.write_text(json.dumps(content))
