"""The one exception type for mistakes a user can fix."""


class SkvError(Exception):
    """A problem the user can fix; the command line prints it as one line and exits with code 2.

    Everything else that escapes is a bug in this project and keeps its traceback.
    """
