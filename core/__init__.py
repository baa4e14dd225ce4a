"""What all packages use and what imports none of them: errors, files, parallel work, process ranks, signals.

`signals` is here because `errors.exits_cleanly` ends a command that a signal stopped.
"""

IGNORE_INDEX = 255  # mask value, and label, of pixels that are not counted
