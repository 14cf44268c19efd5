"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """A mistake in a config, file, weight or shape that the user can mend.

    The message is one line that names the field, the value and the remedy. Scripts print it and
    exit with code 2, without a traceback. Any other exception is a defect of this library and
    keeps its traceback.
    """
