"""What a broken law raises."""


class Violation(AssertionError):
    """A law was broken."""
