"""Self-contained pages about a run, a comparison or a source, and what a model looks at."""
