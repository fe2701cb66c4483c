"""``ray.LoggingConfig``: how Ray's processes log.  minray sets up no logging in anybody's process."""

from __future__ import annotations

from collections.abc import Sequence


class LoggingConfig:
    """For ``ray.init(logging_config=...)``.

    Args:
        encoding: "TEXT"; "JSON" is a NotImplementedError.
        log_level: of Ray's own loggers, which minray does not have: no effect.
        additional_log_standard_attrs: of JSON records: refused with them.
    """

    def __init__(
        self, encoding: str = "TEXT", log_level: str = "INFO", additional_log_standard_attrs: Sequence[str] = ()
    ) -> None:
        if encoding != "TEXT" or additional_log_standard_attrs:
            raise NotImplementedError(
                f"LoggingConfig(encoding={encoding!r}): minray sets up no logging. Configure the logging module in the "
                "driver and, for workers, in the tasks themselves."
            )
        self.encoding = encoding
        self.log_level = log_level
        self.additional_log_standard_attrs = list(additional_log_standard_attrs)
