"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where the run is: with the settings, all that is needed to go on beside the tensors."""

    step: int = 0  # updates done
    epoch: int = 0
    step_in_epoch: int = 0  # updates done in this epoch
    images: int = 0  # unique images, occurrences and damaged images so far
    occurrences: int = 0
    damaged: int = 0
    # Where this epoch was last cut into batches anew, for another number of processes: its steps
    # and pages before that.
    cut_step: int = 0
    cut_page: int = 0
