"""Small blobs in the shared store: many in one object, found by digest through an index."""
