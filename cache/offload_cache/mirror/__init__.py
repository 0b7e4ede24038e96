"""Base images: a pull-through cache of other registries, read with the pool's logins.

`Mirrors` belongs to a node; it gives every project a path of its own in the node's registry.
`BaseImages` is one project's part: it looks names up (`names`), keeps manifests and layers in the
project's store (`content`), and pulls what is missing from the upstream registries (`upstream`,
`transfer`). Nothing is served before it is verified, and nothing that the pool may not read.
"""
