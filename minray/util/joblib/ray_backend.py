"""Ray's name for the module and the class of the joblib backend."""

from minray.util.joblib.backend import MinrayBackend as RayBackend

__all__ = ["RayBackend"]
