"""Builds in continuous integration: what its logs understand, summaries, files of a pipeline."""
