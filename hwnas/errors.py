"""The one error that a user can cause and mend."""


class HwnasError(Exception):
    """A mistake in what hwnas was given: the rule, the value seen, and what to do next.

    The command line shows it as one message without a traceback and exits with status 2. Bugs are not `HwnasError`s.
    """
