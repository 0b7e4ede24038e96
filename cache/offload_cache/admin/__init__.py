"""What administrators and members do with the layer cache of a project: measure, prune, promote."""
