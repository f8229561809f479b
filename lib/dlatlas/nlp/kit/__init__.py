"""What the chapters on language share: tokens and batches, corpora with fixed splits, the published synthetic tasks, recurrent networks."""
