"""What everything else rests on and that knows nothing of it: errors, files, processes, signals."""

IGNORE_INDEX = 255  # the mask value, and the label, of pixels that are not counted
