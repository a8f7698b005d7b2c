"""Search in one's own images with one's own model: build an index, search it, and serve it as a page."""
