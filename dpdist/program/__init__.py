"""From config and data size to compiled programs: gradients, microbatches, optimizer, evaluation."""
