"""The experiments of the course hand-outs that jaxlm descends from, as rows beside the published numbers."""
