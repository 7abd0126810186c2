"""The one exception type for mistakes a user can fix, and the one warning for what a user should know."""


class SkvError(Exception):
    """A problem the user can fix; the command line prints it as one line and exits with code 2.

    Everything else that escapes is a bug in this project and keeps its traceback.
    """


class SkvWarning(UserWarning):
    """Something that goes on otherwise than a user would expect; the command line prints it as one line."""
