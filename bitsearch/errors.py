"""The errors a user can meet, each with its exit code.

    BitsearchError            1   a bug, or a case nobody thought of
    ├── UsageError            2   the command or the arguments are wrong
    ├── InfeasibleBudget      3   no policy fits; carries the achievable range
    ├── BadInput              4   a file, model or text cannot be used
    │   └── SettingsMismatch  4   a run was made with other settings
    └── OutOfResources        5   memory or disk is exhausted

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class BitsearchError(Exception):
    """Base of every error that bitsearch raises on purpose."""

    exit_code = 1


class UsageError(BitsearchError):
    """The command line or the arguments cannot be understood."""

    exit_code = 2


class InfeasibleBudget(BitsearchError):
    """No policy fits the budget; the message holds the achievable range."""

    exit_code = 3


class BadInput(BitsearchError):
    """A file, model or text is missing, broken or of the wrong kind."""

    exit_code = 4


class SettingsMismatch(BadInput):
    """Stored results were made with other settings than the ones asked for."""

    def __init__(self, where: str, setting: str, stored: object, asked: object) -> None:
        super().__init__(
            f"{where} was made with {setting}={stored!r}, not {setting}={asked!r}; "
            "use another --out, or the stored setting"
        )
        self.setting, self.stored, self.asked = setting, stored, asked


class OutOfResources(BitsearchError):
    """Memory or disk space ran out."""

    exit_code = 5
