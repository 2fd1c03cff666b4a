"""Errors that a user can act on."""


class UserError(Exception):
    """Something the user can mend; programs print its message as one line and exit with status 2."""
