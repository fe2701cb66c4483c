"""Ray's home of progress bars in tasks; here they are `minray.util.tqdm`."""

from minray.util.tqdm import safe_print, tqdm

__all__ = ["safe_print", "tqdm"]
