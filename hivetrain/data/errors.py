"""What can be wrong with data. Every error names the place and says what to do; none is ever skipped over."""

from hivetrain.errors import UserError


class DataError(UserError):
    """The data cannot be used as it is."""


class ManifestError(DataError):
    """A manifest is malformed, unpinned, or does not describe the data that was found."""


class UnitError(DataError):
    """One unit cannot be read.

    Args:
        reason: What is wrong.
        unit: Index of the unit.
        file: Path or URL of the file that holds it.
        row_group: Its number within the file.
    """

    def __init__(self, reason: str, *, unit: int, file: str, row_group: int) -> None:
        super().__init__(f"unit {unit} ({file}, row group {row_group}): {reason}")
        self.reason = reason
        self.unit = unit
        self.file = file
        self.row_group = row_group

    def __reduce__(self) -> tuple:
        return _unit_error, (type(self), self.reason, self.unit, self.file, self.row_group)


class HubError(UnitError):
    """The hub did not deliver a unit before the deadline, or refused it for good."""


class AssignmentError(DataError):
    """A window, slot or size that the assignment does not have."""


class TokenizerError(DataError):
    """A tokenizer cannot be loaded or has no end-of-text token."""


def _unit_error(kind: type[UnitError], reason: str, unit: int, file: str, row_group: int) -> UnitError:
    return kind(reason, unit=unit, file=file, row_group=row_group)
