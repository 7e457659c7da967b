"""From a data set to this rank's micro-batches."""
