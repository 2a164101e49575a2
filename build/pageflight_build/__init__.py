"""The build pipeline: checkpoint in, model repository out."""
