"""Generated protobuf code: `v1` is our API, `buildkit` is what we speak of BuildKit's."""
