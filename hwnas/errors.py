"""The errors that a user can cause and mend."""


class HwnasError(Exception):
    """A mistake in what hwnas was given: the rule, the value seen, and what to do next.

    The command line shows it as one message without a traceback and exits with status 2. Bugs are not `HwnasError`s.
    """


class DeviceError(HwnasError):
    """A device that died, stopped answering, or could not run a model."""


class DeviceLostError(DeviceError):
    """A device that died, was cut off, stopped answering or answered nonsense: another try may succeed."""


class UnfitDeviceError(DeviceError):
    """A device that cannot measure until a person has mended something.

    Attributes:
        fault: one of `ssh.MENDS` or `adb.MENDS`.
        found: what was seen.
        mend: what to do, a command where there is one.
    """

    def __init__(self, name: str, fault: str, found: str, mend: str) -> None:
        super().__init__(f"The device {name} cannot measure: {found.rstrip('.')}. {mend}")
        self.fault, self.found, self.mend = fault, found, mend
