"""The errors a caller can act on: each message is one line saying what was given, what is accepted, what to do."""


class InputError(ValueError):
    """What the caller gave cannot be used; the command line prints it and exits with code 2."""


class CheckpointError(InputError):
    """A checkpoint directory is incomplete, altered, or of a version this package does not know."""


class BackendUnavailable(InputError):
    """A backend cannot run on this machine; the message is its reason."""
