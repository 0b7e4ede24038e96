"""The pool as a builder of stock docker buildx, and for other clients of BuildKit."""
