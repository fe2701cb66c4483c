"""IDs: who made what, told by the name itself.

An ID is 16 bytes: ``prefix`` (8) + ``counter`` (4) + ``index`` (4), big endian.

* ``prefix`` is a hash of the parent task's ID, so it is computed once a parent; and of how many
  of its attempts have raised, if any has: the next one's children are new ones.
* ``counter`` numbers the children of that parent, from 1, in program order.
* ``index`` is 0 for the task itself *and* for its first return value (a task and
  its first result share one name), ``i`` for return value ``i`` (a streaming generator has two,
  see node_streams.py, and item ``k`` of it is return ``k + 2``), and
  ``PUT_BIT | n`` for the n-th object that the task itself ``put``, and with
  ``CHECKPOINT_BIT`` as well for the n-th checkpoint of an actor.  Its two highest values mark
  the IDs of workers and nodes: the job's prefix and a number.

The driver is a task too, the root: counter 0 under a prefix drawn at ``init`` (or
derived from the name of a durable job).  Nothing else is random.  When a parent is
replayed its children therefore get the same IDs as before, and those which have
finished need not run again.  What an attempt after one that raised puts has that
prefix, too, and counter 0, which no child has.

Two parents share a prefix with probability n**2 / 2**65 among n parents: 3e-8 for a
million of them.  Wider prefixes were left out: the ID is on every hot path.
"""

from __future__ import annotations

import hashlib
import struct

ID_BYTES = 16
PUT_BIT = 0x8000_0000
CHECKPOINT_BIT = 0x4000_0000
WORKER, NODE = 0xFFFF_FFFF, 0xFFFF_FFFE
"""In place of an index: the ID of a worker or a node."""
NIL = b"\xff" * ID_BYTES

pack_id = struct.Struct(">8sII").pack
"""``pack_id(prefix, counter, index) -> bytes``: the one way an ID is made (0.1 µs)."""
_unpack = struct.Struct(">8sII").unpack


def root_task_id(seed: bytes) -> bytes:
    """The driver's own task ID, from any bytes that name the job."""
    return pack_id(hashlib.blake2b(seed, digest_size=8).digest(), 0, 0)


def children_prefix(task_id: bytes, raised: int = 0) -> bytes:
    """The prefix that all children of ``task_id`` share, when so many of its attempts have raised before."""
    name = task_id[:12] + raised.to_bytes(8, "big") if raised else task_id[:12]
    return hashlib.blake2b(name, digest_size=8).digest()


def putting_id(task_id: bytes, raised: int = 0) -> bytes:
    """What the `put_id`s of ``task_id`` are made from, when so many of its attempts have raised before."""
    return pack_id(children_prefix(task_id, raised), 0, 0) if raised else task_id


def task_of(object_id: bytes) -> bytes:
    """The ID of the task that returned this object, or put it (in an attempt that none which raised came before)."""
    return object_id[:12] + b"\0\0\0\0"


def return_id(task_id: bytes, index: int) -> bytes:
    return task_id[:12] + index.to_bytes(4, "big")


def item_id(task_id: bytes, item: int) -> bytes:
    """What a streaming generator has yielded, counted from 0; behind its two returns: its end, and its reader."""
    return task_id[:12] + (item + 2).to_bytes(4, "big")


def reader_id(task_id: bytes) -> bytes:
    """The object that stands for whoever reads a streaming generator: see node_streams.py."""
    return task_id[:12] + b"\0\0\0\1"


def put_id(task_id: bytes, count: int) -> bytes:
    return task_id[:12] + (PUT_BIT | count).to_bytes(4, "big")


def checkpoint_id(actor_id: bytes, count: int) -> bytes:
    return put_id(actor_id, CHECKPOINT_BIT | count)


def is_checkpoint(object_id: bytes) -> bool:
    return object_id[12] & 0xC0 == 0xC0


def checkpoint_number(object_id: bytes) -> int:
    return index_of(object_id) & ~(PUT_BIT | CHECKPOINT_BIT)


def is_put(object_id: bytes) -> bool:
    return bool(object_id[12] & 0x80)


def index_of(object_id: bytes) -> int:
    """Which return of its task it is."""
    return int.from_bytes(object_id[12:], "big")


def counter_of(task_id: bytes) -> int:
    """It is the n-th child of its parent."""
    return int.from_bytes(task_id[8:12], "big")


def short(some_id: bytes) -> str:
    """The form for people: ``9c1f-12`` (task or first return), ``9c1f-12.1``, ``9c1f-12.p3`` (put),
    ``9c1f-12.c2`` (checkpoint), ``worker-5``."""
    prefix, counter, index = _unpack(some_id)
    if index >= NODE:
        return f"worker-{counter}" if index == WORKER else f"node-{counter}"
    text = f"{prefix[:2].hex()}-{counter}"
    if index & PUT_BIT:
        count = index & ~PUT_BIT
        return f"{text}.c{count & ~CHECKPOINT_BIT}" if count & CHECKPOINT_BIT else f"{text}.p{count}"
    return f"{text}.{index}" if index else text


def matches(text: str, some_id: bytes) -> bool:
    """Whether what a person typed (short form, or a start of the full hex) means this ID."""
    text = text.strip().lower()
    return text == short(some_id) or (len(text) >= 4 and "-" not in text and some_id.hex().startswith(text))
