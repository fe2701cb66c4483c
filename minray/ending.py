"""How the driver's program ends: well or not, as far as a program can know that of itself.

At exit Python tells nobody why.  Three things are there to be seen: an exception in flight
(`shutdown` is called while one leaves a ``with`` or a ``finally``), `sys.last_value` (the
traceback of an uncaught one has just been printed), and the code of a SystemExit, which the
interpreter reads when nobody has caught it.  For that last one `sys.exit` is wrapped while a
session is there: it raises a SystemExit that notices who reads its code.

Knows nothing of sessions.  Left out: a SystemExit that the program raises itself
(``raise SystemExit(3)``, the shell's ``exit(3)``) instead of calling ``sys.exit``.  It leaves no trace
that could be found; the program counts as ended well.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class _Exit(SystemExit):
    """What the wrapped sys.exit raises."""

    ended_with: Any = None  # the code with which the program ends

    @property
    def code(self) -> Any:  # type: ignore[override]
        code = super().code
        if sys._getframe().f_back is None:  # No Python code asks: it is the interpreter, at the very end.
            _Exit.ended_with = code
        return code


class Ending:
    """From now on it is watched how this program ends."""

    def __init__(self) -> None:
        self._last_error = getattr(sys, "last_value", None)
        self._exit: Callable[..., NoReturn] = sys.exit

        @functools.wraps(self._exit)
        def exit(status: Any = None, /) -> NoReturn:
            raise _Exit(status)

        self._wrapper = sys.exit = exit

    def is_bad(self) -> bool:
        """To be asked at exit, or in a `finally`: whether the program fails."""
        error = sys.exc_info()[1]
        if isinstance(error, SystemExit):
            return _is_bad(error.code)
        if error is not None or _is_bad(_Exit.ended_with):
            return True
        # In an interactive interpreter the last error ended a line, and nothing else.
        return not hasattr(sys, "ps1") and getattr(sys, "last_value", None) is not self._last_error

    def unwatch(self) -> None:
        if sys.exit is self._wrapper:
            sys.exit = self._exit


def _is_bad(code: Any) -> bool:
    """As the interpreter turns it into a status: None and 0 are success, text is a complaint."""
    return code is not None and not (isinstance(code, int) and code == 0)
