"""What can go wrong with a checkpoint, by what is to be done about it. `UserError` is the third kind."""


class CheckpointError(RuntimeError):
    """Storage failed, here or on another rank: trying again may help. The message is one line."""


class CorruptCheckpoint(CheckpointError):
    """What storage returned is not what was written: set the checkpoint aside and take an older one."""
