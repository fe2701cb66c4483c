"""Whether two pickles say the same, though their bytes differ.

A pickle refers back to a string that comes again only if it is the same *object*, and whether two equal strings
are one object depends on what a process has done before.  So the same function, pickled in two workers, has other
bytes now and then; a second attempt of a task that submits it has changed nothing (see node_recovery.py).

Looks at opcodes, unpickles nothing.  Left out: shared tuples and other objects, which come from the code and not
from the process.
"""

from __future__ import annotations

from typing import Any

_UNSAID = {"PROTO", "FRAME"}
_REFERENCES = {"BINGET", "LONG_BINGET"}
_LITERALS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}


def says_the_same(one: bytes | None, other: bytes | None) -> bool:
    """
    >>> import pickle
    >>> says_the_same(pickle.dumps(["abc", "".join("abc")]), pickle.dumps(["abc"] * 2))
    True
    >>> says_the_same(pickle.dumps(["abc", "abc"]), pickle.dumps(["abc", "abd"]))
    False
    """
    if one == other:
        return True
    if not one or not other:
        return False
    try:
        return _said(one) == _said(other)
    except Exception:  # It has parts beside the pickle: large buffers.
        return False


def _said(pickled: bytes) -> list[Any]:
    """What it does, one after the other: strings in full wherever they stand, other objects by their number."""
    import pickletools  # Large, and seldom needed.

    said: list[Any] = []
    memo: list[Any] = []
    objects = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MEMOIZE":
            if said[-1][0] in _LITERALS:
                memo.append(said[-1])
            else:
                memo.append(("object", objects))
                objects += 1
        elif name in _REFERENCES:
            said.append(memo[int(argument or 0)])
        elif name not in _UNSAID:
            said.append((name, argument))
    return said
