"""The errors that depthmix raises. All are `DepthmixError`, so one `except` catches them."""


class DepthmixError(Exception):
    """Something is wrong that the user can mend; the message says how."""


class ConfigError(DepthmixError, ValueError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DiscoveryError(DepthmixError, ValueError):
    """The structure of the model could not be established; the message names what was found."""


class CheckpointError(DepthmixError, ValueError):
    """A saved adapter does not fit: a missing, extra or misshapen tensor, or a wrong base model."""


class TrainingError(DepthmixError, RuntimeError):
    """A training set-up in which MoDE would silently learn nothing, or learn wrong."""


class DataError(DepthmixError, ValueError):
    """A data file or row is broken; the message names the file, the line and the field."""
