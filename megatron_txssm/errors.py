"""What the command line prints without a traceback."""


class UserError(Exception):
    """A mistake the user can mend: name, value, remedy. The command line prints it and exits with 2."""
