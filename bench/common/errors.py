"""How a case fails without a bug: bad input, or a backend that cannot run here."""


class UsageError(ValueError):
    """Bad input. `resfuse` prints it as one sentence and exits with code 2."""


class Unavailable(RuntimeError):
    """A backend cannot run this case on this machine; the message says why in one sentence."""


class CannotTake(Unavailable):
    """A backend cannot run this network, whatever it can do with others."""


class CannotServe(RuntimeError):
    """Queries come faster than a backend answers them, or than its limit of time allows."""


class LeftOutWarning(UserWarning):
    """Something damaged is not used; `resfuse` prints it as one sentence and goes on."""
