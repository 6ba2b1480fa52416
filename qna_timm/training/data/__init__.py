"""From a dataset's name to batches on the device, the same ones however often a run is resumed."""
