"""``ray.util.debug``: `log_once`, by which libraries keep a warning from repeating itself."""

_logged: set[str] = set()


def log_once(key: str) -> bool:
    """True the first time that it is called with this key in this process."""
    if key in _logged:
        return False
    _logged.add(key)
    return True


__all__ = ["log_once"]
