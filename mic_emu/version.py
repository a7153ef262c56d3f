"""The package's version and that of its control socket; the only place they are written."""

VERSION = "0.1.0"
# What a command and a host process must agree on: the requests of the control socket and the keys of the
# configuration. Raised when one of them goes or changes (tests/cosm/test_upgrade.py knows them); a host process of
# another protocol takes only ``status``, ``stop`` and ``events``.
PROTOCOL = 3
