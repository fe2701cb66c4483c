"""A backend of joblib, and so of scikit-learn: ``joblib.parallel_backend("minray")``.

The backend itself is in backend.py, which needs joblib; minray does not.

>>> import joblib
>>> from minray.util.joblib import register_minray
>>> register_minray()
>>> with joblib.parallel_backend("minray", n_jobs=2):
...     joblib.Parallel()(joblib.delayed(pow)(x, 2) for x in range(4))
[0, 1, 4, 9]
"""


def register_minray() -> None:
    """Make the backend known to joblib as "minray"."""
    _register("minray")


def register_ray() -> None:
    """Make it known under Ray's name, "ray"."""
    _register("ray")


def _register(name: str) -> None:
    try:
        import joblib
    except ImportError as error:
        raise ImportError(f"register_{name}() needs joblib, which is not installed: pip install joblib") from error
    from minray.util.joblib.backend import MinrayBackend

    joblib.register_parallel_backend(name, MinrayBackend)


__all__ = ["register_minray", "register_ray"]
