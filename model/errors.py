"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Something the user asked for cannot be done as asked.

    The message is one or two plain lines that name the key or file and say what to do. The command line prints it
    without a stack trace and exits with code 2; every other exception is a fault of ours and is allowed to raise.
    """
