"""The words of collective communication, as Ray has them."""

import enum


class ReduceOp(enum.Enum):
    """How arrays are made one."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3


class Backend:
    """Ray's names for who carries the data.  Here it is shared memory, for all but NCCL, which is refused."""

    NCCL = "nccl"
    GLOO = "gloo"
    TORCH_GLOO = "torch_gloo"
    SHM = "shm"


__all__ = ["Backend", "ReduceOp"]
